"""What the server allows, to whom, and how much of it. The defaults suit one person on one machine."""

from dataclasses import dataclass
from pathlib import Path

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How a model folder is served."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 is every one of this machine, and wants --api-keys."""
    port: int = 8000
    """Port to listen on; 0 takes a free one."""
    name: str = "mmllm"
    """What clients call the model."""
    api_keys: Path | None = None
    """File of API keys, one a line, of which every request must bear one; without it anybody may ask who reaches the port."""
    origins: tuple[str, ...] = ()
    """Web origins (https://example.org) whose pages may call from a browser; none but our own by default."""
    remote_pictures: bool = False
    """Fetch pictures that a chat names by http(s) URL; private addresses never."""
    edits: bool = False
    """The model was tuned to edit pictures (conversations of picture and request → picture): opens /v1/images/edits."""
    rows: int = 32
    """Answers or pictures decoded together; more wait."""
    queue: int = 256
    """Answers or pictures that may wait; beyond it clients are told to come again."""
    max_body: int = 20_000_000
    """Largest request, in bytes."""
    max_pixels: int = 16_000_000
    """Largest picture that is read."""
    max_pictures: int = 16
    """Pictures that one request may show."""
    max_prompt: int = 8_192
    """Tokens of a conversation or prompt, pictures included."""
    max_text: int = 1_024
    """Text tokens of an answer; a quarter of it where a client names no number."""
    max_n: int = 8
    """Answers or pictures of one request."""
    guidance: float = 1.0
    """How much more than without the text pictures follow it, where a client does not say; 1 is none."""
    image_temperature: float = 0.3
    """Of image codes, where a client does not say."""
    kept_bytes: int = 100_000_000
    """Pictures handed out by URL that are kept in memory; the oldest go first."""
    body_s: float = 30.0
    """Seconds within which a request must have arrived."""
    stop_s: float = 20.0
    """Seconds that running requests have to end when the server is told to stop."""

    def __post_init__(self) -> None:
        for name in ("rows", "queue", "max_body", "max_pixels", "max_prompt", "max_text", "max_n", "kept_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)} must be at least 1")
        if not 0 <= self.port < 65_536 or not self.name or min(self.body_s, self.stop_s, self.image_temperature, self.max_pictures) < 0:
            raise ValueError(f"{self}: a port is below 65,536, a name has a letter, and times, temperatures and counts are not negative")
        if self.max_n > self.queue:
            raise ValueError(f"--max-n {self.max_n} answers never fit a --queue of {self.queue}: raise the queue")

    @property
    def private(self) -> bool:
        """Only this machine reaches it."""
        return self.host in LOOPBACK


def read_keys(path: Path) -> tuple[str, ...]:
    """The keys of a file. Errors: ValueError, OSError."""
    keys = tuple(line.strip() for line in path.read_text().splitlines() if line.strip() and not line.startswith("#"))
    if not keys or min(map(len, keys)) < 16:
        raise ValueError(f"{path} must hold one key a line, of at least 16 characters each: `openssl rand -hex 24` makes one")
    return keys
