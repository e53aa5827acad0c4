"""Drawing, describing and chatting: legal whatever the model says, and the same whoever else asks."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_model
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmllm.generate.engine import Engine, Plan, decode
from mmllm.generate.grammar import DONE, GRID, TEXT, Processor, compile_grammar
from mmllm.generate.sample import LARGEST, SMALLEST, Sampling, sample, uniforms
from mmllm.serve.chat import chat, half_blocks

VOCAB = tiny_model.vocabulary()
GRAMMAR = compile_grammar(VOCAB, (VOCAB.eos, VOCAB.user))
PROMPTS = ["a red star", "two blue squares above a green circle", "how", "a green circle left of the background"]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return Engine.load(tiny_model.folder(tmp_path_factory.mktemp("generate") / "plain"), "cpu")


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    return Engine.load(tiny_model.folder(tmp_path_factory.mktemp("generate") / "tuned", chat=True), "cpu")


def stock(engine: Engine):
    from transformers import AutoModelForCausalLM
    return AutoModelForCausalLM.from_pretrained(engine.folder.path, attn_implementation="eager").eval()


def eager(engine: Engine) -> Engine:
    """The same with nothing to say: it draws wherever <boi> has a positive logit."""
    head = engine.decoder.head.clone()
    head[[*range(VOCAB.text_size), VOCAB.eos, VOCAB.user]] = 0
    return replace(engine, decoder=replace(engine.decoder, head=head))


# Grammar ----------------------------------------------------------------------------------------------------------

def random_row(rng: np.random.Generator, length: int) -> list[int]:
    """Any row that the grammar allows."""
    row, state = [VOCAB.bos], torch.tensor([TEXT])
    while len(row) < length and state.item() != DONE:
        allowed = GRAMMAR.allowed(state, 0, VOCAB.size)[0].nonzero()[:, 0].numpy()
        any_of_them = int(rng.choice(allowed[allowed != VOCAB.eos]))
        row.append(VOCAB.boi if state.item() == TEXT and rng.random() < 0.3 else any_of_them)
        state = GRAMMAR.advance(state, torch.tensor(row[-1:]))
    return row


@pytest.mark.parametrize("seed", range(20))
def test_the_state_of_a_row_is_the_same_read_whole_or_id_by_id(seed: int) -> None:
    row = random_row(np.random.default_rng(seed), 60)
    state = torch.tensor([TEXT])
    for length in range(2, len(row) + 1):
        state = GRAMMAR.advance(state, torch.tensor(row[length - 1:length]))
        assert GRAMMAR.states(torch.tensor([[VOCAB.pad, *row[:length]]])) == state


def span(state: torch.Tensor) -> tuple[int, int]:
    """The ids that may follow."""
    return int(GRAMMAR.first[state]), int(GRAMMAR.last[state])


def test_a_picture_is_one_grid_and_exactly_its_codes_book_by_book() -> None:
    state = GRAMMAR.advance(torch.tensor([TEXT]), torch.tensor([VOCAB.boi]))
    assert state == GRID and span(state) == (VOCAB.grid(3, 3), VOCAB.grid(2, 3) + 1)
    state = GRAMMAR.advance(state, torch.tensor([VOCAB.grid(2, 3)]))
    for place in range(12):
        first = VOCAB.first_image + place % 2 * VOCAB.codebook_size
        assert span(state) == (first, first + VOCAB.codebook_size)
        state = GRAMMAR.advance(state, torch.tensor([first + 5]))
    assert span(state) == (VOCAB.eoi, VOCAB.eoi + 1)
    assert GRAMMAR.advance(state, torch.tensor([VOCAB.eoi])) == TEXT


def test_outside_a_picture_only_text_a_beginning_and_an_end_are_allowed() -> None:
    allowed = GRAMMAR.allowed(torch.tensor([TEXT, TEXT]), 0, VOCAB.size, torch.tensor([True, False]))
    text = set(range(VOCAB.text_size))
    assert set(allowed[0].nonzero()[:, 0].tolist()) == text | {VOCAB.boi, VOCAB.eos, VOCAB.user}
    assert set(allowed[1].nonzero()[:, 0].tolist()) == text | {VOCAB.eos, VOCAB.user}


# Sampling ---------------------------------------------------------------------------------------------------------

@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**31), st.floats(1e-6, 50), st.integers(0, 400), st.floats(1e-4, 1))
def test_a_forbidden_id_is_never_sampled(seed: int, temperature: float, top_k: int, top_p: float) -> None:
    torch.manual_seed(seed)
    logits = torch.randn(8, 300) * 10
    forbidden = torch.rand(8, 300) < 0.9
    forbidden[:, 7] = False
    logits = logits.masked_fill(forbidden, -torch.inf)
    ids = sample(logits, uniforms(range(8), 1)[:, 0], Sampling(temperature=temperature, top_k=top_k, top_p=top_p))
    assert not forbidden.gather(1, ids[:, None]).any()


@pytest.mark.parametrize("wrong", [{"temperature": 1e-46}, {"temperature": -1.0}, {"temperature": float("nan")},
                                   {"temperature": float("inf")}, {"top_p": 5e-324}, {"top_p": 0.0}, {"top_p": float("nan")}])
def test_what_would_leave_no_id_is_refused_and_what_is_next_to_it_is_not(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="temperature must be 0 or in"):
        Sampling(**wrong)  # type: ignore[arg-type]
    logits = torch.tensor([[0.0, -torch.inf, 2.0]])
    for how in (Sampling(temperature=SMALLEST), Sampling(top_p=SMALLEST)):
        assert sample(logits, torch.tensor([0.9]), how) == 2
    assert sample(logits, torch.tensor([0.1]), Sampling(temperature=LARGEST)) == 0


def test_samples_have_the_frequencies_of_the_model() -> None:
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    logits, u = p.log().expand(20_000, 4), uniforms([3], 20_000)[0]
    for how, expected in ((Sampling(), p), (Sampling(top_k=2), torch.tensor([0.625, 0.375, 0, 0])),
                          (Sampling(top_p=0.9), torch.tensor([0.5, 0.3, 0.15, 0]) / 0.95),
                          (Sampling(temperature=0.5), p**2 / (p**2).sum())):
        assert torch.allclose(sample(logits, u, how).bincount(minlength=4) / 20_000, expected, atol=0.015)


def test_top_p_of_a_flat_distribution_reaches_beyond_the_first_sort() -> None:
    ids = sample(torch.zeros(4000, 2000), uniforms([1], 4000)[0], Sampling(top_p=0.9))
    assert 1600 < ids.unique().numel() <= 1800


def test_a_requests_numbers_do_not_change_with_how_many_are_asked_for() -> None:
    assert torch.equal(uniforms([5, 6], 10)[1], uniforms([6], 100)[0, :10])


# The engine against stock transformers ----------------------------------------------------------------------------

@pytest.mark.parametrize("shape", [{}, {"qk_layernorm": False}, {"num_query_groups": 4, "tie_embeddings": True},
                                   {"head_dim": 16}])
def test_logits_equal_those_of_transformers_at_every_step(tmp_path: Path, shape: dict[str, object]) -> None:
    engine = Engine.load(tiny_model.folder(tmp_path / "m", **shape), "cpu")
    model = stock(engine)
    rows = [[VOCAB.bos, *engine.folder.text.encode(words)] for words in PROMPTS]
    with torch.inference_mode():
        hidden, cache = engine.decoder.start(rows, 4)
        for step in range(4):
            theirs = torch.stack([model(torch.tensor([row])).logits[0, -1] for row in rows])
            assert torch.allclose(engine.decoder.logits(hidden), theirs, atol=1e-4)
            ids = torch.tensor([17 + 3 * i + step for i in range(len(rows))])
            rows = [[*row, token] for row, token in zip(rows, ids.tolist(), strict=True)]
            hidden = engine.decoder.read(ids[:, None], cache)


@pytest.mark.parametrize("words", ["a red star", "two blue squares above", "what colour is the background?"])
def test_greedy_equals_generate_of_transformers_under_the_same_grammar(engine: Engine, words: str) -> None:
    prompt = [VOCAB.bos, *engine.folder.text.encode(words), VOCAB.boi]
    plan = Plan(image=Sampling(temperature=0), max_text=20, max_pictures=3)
    ours = decode(engine.decoder, engine.grammar, [prompt], [0], plan)[0]
    ids = torch.tensor([prompt])
    theirs = stock(engine).generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=len(ours), do_sample=False,
                                    logits_processor=[Processor(engine.grammar, 10_000)])
    assert len(ours) > 20 and theirs[0, len(prompt):].tolist() == ours


def test_generate_of_transformers_cuts_no_picture_at_its_limit(engine: Engine) -> None:
    ids = torch.tensor([[VOCAB.bos, VOCAB.boi]] * 32)
    torch.manual_seed(0)
    rows = stock(engine).generate(ids, attention_mask=torch.ones_like(ids), max_length=60, do_sample=True,
                                  temperature=5.0, top_k=0, logits_processor=[Processor(engine.grammar, 60)])
    begun, ended = (rows == VOCAB.boi).sum(1), (rows == VOCAB.eoi).sum(1)
    assert torch.equal(begun, ended) and begun.max() > 1


def test_guidance_mixes_in_what_the_model_draws_without_the_text(engine: Engine) -> None:
    """At a guidance of 0 only the second row counts, which sees nothing of the prompt."""
    blank = engine.draw([""], guidance=1.0, sampling=Sampling(temperature=0))
    drawn = engine.draw(PROMPTS, guidance=0.0, sampling=Sampling(temperature=0))
    assert (drawn == blank).all()
    assert not (engine.draw(PROMPTS, guidance=1.0, sampling=Sampling(temperature=0)) == blank).all()


@pytest.mark.parametrize("guidance", [0.0, 2.5])
def test_guidance_of_a_picture_begun_in_the_middle_is_that_of_one_asked_for(engine: Engine, guidance: float) -> None:
    """The second row forgets the prompt at <boi>, wherever it comes."""
    how = Plan(image=Sampling(temperature=0), guidance=guidance, max_pictures=1, max_text=30)
    prompts = [[VOCAB.bos, *engine.folder.text.encode(words)] for words in PROMPTS]
    decoder = eager(engine).decoder
    rows = decode(decoder, GRAMMAR, prompts, [0] * len(prompts), how)
    drawn = [(prompt, row) for prompt, row in zip(prompts, rows, strict=True) if VOCAB.boi in row]
    assert any(row[0] != VOCAB.boi for _, row in drawn)
    for prompt, row in drawn:
        at = row.index(VOCAB.boi) + 2
        again = decode(decoder, GRAMMAR, [prompt + row[:at]], [0], replace(how, only_picture=True, max_pictures=0))[0]
        assert again == row[at:row.index(VOCAB.eoi)]


# What users rely on -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("how", [Sampling(temperature=100), Sampling(temperature=1e-6), Sampling(temperature=0),
                                 Sampling(temperature=3, top_k=2), Sampling(temperature=10, top_p=0.01)])
@pytest.mark.parametrize("guidance", [1.0, -50.0, 100.0])
def test_every_picture_is_legal_however_it_is_sampled(engine: Engine, how: Sampling, guidance: float) -> None:
    for grid in VOCAB.grids:
        codes = engine.draw(PROMPTS, n=9, guidance=guidance, sampling=how, grid=grid)  # refuses an illegal one
        assert codes.shape == (4, 9, 2, *grid) and 0 <= codes.min() <= codes.max() < VOCAB.codebook_size


def test_one_seed_gives_one_picture_at_any_batch_and_place(engine: Engine) -> None:
    how = Sampling(temperature=2.0)
    for guidance in (1.0, 3.0):
        together = engine.draw(PROMPTS * 5, n=3, guidance=guidance, sampling=how, seed=7)
        small = replace(engine, batch=2).draw(PROMPTS[::-1], n=2, guidance=guidance, sampling=how, seed=7)
        alone = engine.draw(PROMPTS[1:2], guidance=guidance, sampling=how, seed=7)
        assert (together[:4, :2] == small[::-1]).all() and (together[1, 0] == alone[0, 0]).all()
        assert (together[:4] == together[4:8]).all() and not (together[:, 0] == together[:, 1]).all()
    assert not (engine.draw(PROMPTS, sampling=how, seed=8) == engine.draw(PROMPTS, sampling=how, seed=7)).all()


def test_text_budgets_hold_and_cut_no_picture(engine: Engine) -> None:
    prompts = [[VOCAB.bos, *engine.folder.text.encode(words)] for words in PROMPTS * 8]
    hot = Sampling(temperature=0.3)
    plan = Plan(text=hot, image=hot, max_text=6, max_pictures=2)
    rows = decode(eager(engine).decoder, GRAMMAR, prompts, range(32), plan)
    counts = [row.count(VOCAB.boi) for row in rows]
    assert max(counts) == 2 and all(row.count(VOCAB.eoi) == count for row, count in zip(rows, counts, strict=True))
    for row, count in zip(rows, counts, strict=True):
        pictures = sum(2 + 2 * h * w for h, w in VOCAB.grids for token in row if token == VOCAB.grid(h, w))
        assert len(row) - pictures <= 6 and count <= 2


@pytest.mark.parametrize("name", ["engine", "tuned"])
def test_descriptions_do_not_depend_on_the_batch(name: str, request: pytest.FixtureRequest) -> None:
    engine: Engine = request.getfixturevalue(name)
    codes = np.random.default_rng(0).integers(0, 48, (12, 2, 3, 3)).astype(np.int32)
    questions = tiny_model.sentences(12)
    together = engine.describe(codes, questions, max_text=8)
    assert together == [engine.describe(codes[i:i + 1], questions[i], max_text=8)[0] for i in range(12)]
    assert len(set(together)) > 1 and together != engine.describe(codes, max_text=8)


def test_pictures_are_encoded_and_codes_are_painted(engine: Engine) -> None:
    images = torch.rand(3, 3, 24, 24) * 2 - 1
    codes = engine.codes(images)
    assert engine.describe(images, max_text=4) == engine.describe(codes, max_text=4)
    assert torch.allclose(engine.pictures(codes[:, None])[:, 0], engine.visual.decode(torch.from_numpy(codes)))


def test_a_folder_of_documents_does_not_chat(engine: Engine) -> None:
    with pytest.raises(ValueError, match="was not tuned on conversations"):
        engine.chat([{"role": "user", "content": "a red star"}])


def test_questions_are_one_for_all_or_one_each(engine: Engine) -> None:
    with pytest.raises(ValueError, match="2 questions for 3 pictures"):
        engine.describe(np.zeros((3, 2, 3, 3), np.int32), ["how many?", "what colour?"])


# The terminal -----------------------------------------------------------------------------------------------------

def talk(tuned: Engine, tmp_path: Path, *lines: str) -> str:
    screen = io.StringIO()
    plan = Plan(image=Sampling(temperature=0), max_text=8, max_pictures=1)
    chat(tuned, lines, screen, tmp_path / "out", plan, seed=0)
    return screen.getvalue()


def test_a_chat_from_a_pipe_takes_pictures_and_survives_mistakes(tuned: Engine, tmp_path: Path) -> None:
    Image.new("RGB", (40, 30), "red").save(tmp_path / "x.png")
    (tmp_path / "no.png").write_text("hello")
    said = talk(tuned, tmp_path, f"/image {tmp_path}/x.png\n", "how many?\n", f"/image {tmp_path}/no.png\n",
                "/image nowhere.png\n", "/fly\n", "/seed x\n", "what colour?\n", "/quit\n", "never read\n").splitlines()
    errors = [line for line in said if line.startswith("error: ")]
    assert "does not decode" in errors[0] and "nowhere.png" in errors[1] and len(errors) == 3
    assert any(line == "there is no command /fly; /help lists them" for line in said)


def test_drawn_pictures_are_saved_under_numbers_that_are_free(tuned: Engine, tmp_path: Path) -> None:
    drawer = eager(tuned)
    drawer.decoder.head[[VOCAB.grid(3, 3), VOCAB.grid(2, 3)]] = 0  # of equals the first, which can be painted
    said = "".join(talk(drawer, tmp_path, f"{words}\n") for words in PROMPTS)
    files = sorted(p.name for p in (tmp_path / "out").glob("*.png"))
    assert files[0] == "0001.png" and len(files) == said.count("[picture: ") > 1
    assert Image.open(tmp_path / "out" / "0001.png").size == (24, 24)


def test_half_blocks_show_two_pixels_a_character() -> None:
    picture = Image.new("RGB", (2, 2), (1, 2, 3))
    picture.putpixel((0, 1), (9, 8, 7))
    lines = half_blocks(picture).split("\n")
    assert len(lines) == 1 and lines[0].count("▀") == 2
    assert lines[0].startswith("\x1b[38;2;1;2;3;48;2;9;8;7m▀\x1b[38;2;1;2;3;48;2;1;2;3m▀")
