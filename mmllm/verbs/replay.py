"""The verb on a step gone wrong: compute it again, document by document."""

import json
from dataclasses import dataclass
from pathlib import Path

from mmllm.progress import say
from mmllm.verbs.verb import Verb


@dataclass(frozen=True, kw_only=True)
class ReplayStep:
    """Compute a dumped training step again and list the documents that weigh most in it."""

    step: Path
    """A file RUN/bad_step_*.pt; those of other ranks are found beside it."""
    checkpoint: Path | None = None
    """Whose weights compute; the newest one before the step if None."""
    tp: int = 1
    """Processes that split the model. Gradients of single documents are there with one."""
    top: int = 20
    """Documents to list."""
    json: bool = False
    """Print all of it as JSON."""


def replay_step(args: ReplayStep) -> None:
    from mmllm.runs.replay import main

    if args.tp < 1 or args.top < 1:
        raise ValueError(f"--tp {args.tp} and --top {args.top} must be at least 1")
    report = main(args.step, args.checkpoint, args.tp)
    if args.json:
        say(json.dumps(report))
        return
    ahead, parts = report["step"] - report["checkpoint_step"], report["documents"]
    say(f"step {report['step']} by the weights of {report['checkpoint']}" + (f", {ahead} updates before it" if ahead else ", those it had"))
    say("then: " + "  ".join(f"{name} {value:.4g}" for name, value in report["then"].items()))
    say(f"now:  loss {sum(part['of_step'] for part in parts):.4g}, of it by document")
    for part in parts[:args.top]:
        losses = "  ".join(f"{name} {part[name]:.4f}" for name in ("loss/text", "loss/image") if name in part)
        gradient = f"  gradient {part['gradient']:.4f}" if "gradient" in part else ""
        say(f"  {part['of_step']:.4f}{gradient}  {losses}  {part['tokens']:,} tokens  {part['key']}")
    if len(parts) > args.top:
        say(f"  and {len(parts) - args.top} more (--top)")


VERBS = {"replay": Verb(ReplayStep, replay_step, ("step",))}
