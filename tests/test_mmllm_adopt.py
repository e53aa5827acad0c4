"""A Hugging Face model comes in, grows a vocabulary, and goes out as it was."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_base
import tiny_model
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from toy_rows import tiny
from warm_ranks import losses_from

from data import chat
from data.config import DataConfig
from data.vocab import Vocab
from mmllm import hf, streams
from mmllm.adopt import adopt
from mmllm.config import Optim, Parallel
from mmllm.export import export
from mmllm.launch import launch
from mmllm.streams import Checkpoint
from mmllm.violations import violations
from mmllm.weights import read_model
from tokenizer.text import TextTokenizer


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Bases, imports and exports of all shapes, and a visual tokenizer."""
    folder = tmp_path_factory.mktemp("adopt")
    tiny_model.saved_visual_tokenizer(folder, 2, 48)
    for kind in tiny_base.SHAPES:
        base = tiny_base.folder(folder / kind / "base", kind)
        adopt(base, folder / kind / "start", folder / "visual-2-48")
        export(folder / kind / "start", folder / kind / "hf", None, None, folder / "visual-2-48")
    return folder


def table(start: Path, name: str) -> torch.Tensor:
    """All rows of a vocabulary's table, padding included."""
    stored = Checkpoint(start)
    size = stored.entries[name].size
    return stored.part(name, [0, 0], size)


@pytest.mark.parametrize("kind", tiny_base.SHAPES)
def test_every_original_weight_comes_back_bit_for_bit(made: Path, kind: str) -> None:
    before, after = (streams.read(made / kind / name) for name in ("base", "hf"))
    assert before.keys() == after.keys()
    for name in before:
        old, new = before[name].make(), after[name].make()
        assert old.dtype == new.dtype and torch.equal(old, new[:len(old)]), name
        tables = name in ("model.embed_tokens.weight", "lm_head.weight")
        assert len(new) == (Vocab.load(made / kind / "hf" / "vocab.json").size if tables else len(old))


@pytest.mark.parametrize("kind", tiny_base.SHAPES)
def test_text_is_answered_exactly_as_the_base_answers(made: Path, kind: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    words = "how many <think> red stars\n are in the picture?"
    before, after = (AutoTokenizer.from_pretrained(made / kind / name)(words, return_tensors="pt")["input_ids"] for name in ("base", "hf"))
    assert torch.equal(before, after)
    old, new = (AutoModelForCausalLM.from_pretrained(made / kind / name, dtype=torch.float32) for name in ("base", "hf"))
    with torch.no_grad():
        expected, found = old(before).logits, new(after).logits
    assert type(old) is type(new) and expected.std() > 0.5
    assert torch.equal(found[..., :tiny_base.ROWS], expected)


def test_our_engine_gives_the_logits_of_the_exported_model(made: Path) -> None:
    from transformers import AutoModelForCausalLM

    from mmllm.generate.decoder import build
    for kind in tiny_base.SHAPES.keys() - {"qwen3_moe"}:
        folder = hf.open_folder(made / kind / "hf")
        decoder = build(folder.config, folder.tensors())
        ids = [5, 100, 7, folder.vocab.boi, 30, 31, 32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 42, 43, 44, 45]
        with torch.no_grad():
            hidden, _ = decoder.start([ids], 0)
            theirs = AutoModelForCausalLM.from_pretrained(folder.path, dtype=torch.float32)(torch.tensor([ids])).logits[:, -1]
        torch.testing.assert_close(decoder.logits(hidden), theirs, rtol=0, atol=1e-4)


# Rows -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_new_rows_start_near_the_mean_and_padding_is_empty(made: Path, kind: str) -> None:
    start = made / kind / "start"
    vocab, rows = Vocab.load(start / "vocab.json"), table(start, "embedding.word_embeddings.weight").float()
    base, new = rows[:tiny_base.TOKENS], rows[vocab.first_image:vocab.size]
    assert vocab.text_size == tiny_base.ROWS and rows.shape[0] % 128 == 0 and not rows[vocab.size:].any()
    assert torch.equal(rows[vocab.eos], rows[tiny_base.TOKENS - 5])  # the base's own end
    away = (new - base.mean(0)) / base.std(0)
    assert away.mean().abs() < 0.01 and 0.09 < away.std() < 0.11
    assert len(new.unique(dim=0)) == len(new)


def test_given_rows_are_placed_by_id(made: Path, tmp_path: Path) -> None:
    vocab = Vocab.load(made / "qwen3" / "start" / "vocab.json")
    ids = torch.tensor([vocab.size - 1, vocab.user, vocab.first_image + 3])
    rows, output = torch.randn(2, 3, 32).bfloat16()
    save_file({"ids": ids, "rows": rows, "output_rows": output}, tmp_path / "rows.safetensors")
    adopt(made / "qwen3" / "base", tmp_path / "start", made / "visual-2-48", init_rows=tmp_path / "rows.safetensors")
    for name, expected in (("embedding.word_embeddings.weight", rows), ("output_layer.weight", output)):
        found, before = (table(folder, name) for folder in (tmp_path / "start", made / "qwen3" / "start"))
        assert torch.equal(found[ids], expected)
        others = torch.ones(len(found), dtype=torch.bool).index_fill(0, ids, False)
        assert torch.equal(found[others], before[others])


def test_codes_that_stand_for_words_of_this_base_start_as_those_words(made: Path, tmp_path: Path) -> None:
    visual: Any = tiny_model.visual_tokenizer()
    embedding = made / "qwen3" / "base"
    from tokenizer.text_rows import read_embedding
    matrix = read_embedding(embedding)
    visual.quantizer.text_checksum = matrix.checksum
    try:
        visual.save(tmp_path / "visual")
    finally:
        visual.quantizer.text_checksum = ""
    adopt(embedding, tmp_path / "start", tmp_path / "visual", noise=0.0)
    vocab = Vocab.load(tmp_path / "start" / "vocab.json")
    for name, meant in (("embedding.word_embeddings.weight", True), ("output_layer.weight", False)):
        found = table(tmp_path / "start", name)
        for book in range(2):
            words = visual.quantizer.words(book)
            rows = found[vocab.first_image + book * 48:][:48]
            expected = matrix.matrix[words].float().mean(1).bfloat16()
            assert torch.equal(rows, expected) == meant


# Text -----------------------------------------------------------------------------------------------------------------

TYPED = ["<eos>", "<eos;>", ";", "\u037e", "<image_0_00001;>", "<bos>", "<unk>", "<boi>", "<image_0_00001>", "<|im_start|>",
         "<|endoftext|>", "<think>", "<|unused_383|>", "<", "<\ufdd0", "\ufdd0", "a red", " ", "star", "\n", "é", "e\u0301", "<\u0338",
         "漢"]
ANY_TEXT = st.one_of(st.text(max_size=40), st.lists(st.sampled_from(TYPED), max_size=8).map("".join))


@pytest.fixture(scope="module", params=["qwen2", "qwen3", "llama"])
def both(made: Path, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[TextTokenizer, Any, Any, Vocab]:
    """Our text tokenizer, the exported one and the base's, with merges and with whole words first."""
    from transformers import AutoTokenizer
    folder = tmp_path_factory.mktemp("text")
    shutil.copytree(made / request.param / "base", folder / "base")
    (folder / "base" / "tokenizer.json").write_text(tiny_base.tokenizer_json(ignore_merges=request.param == "llama"))
    adopt(folder / "base", folder / "start", made / "visual-2-48")
    export(folder / "start", folder / "hf", None, None, made / "visual-2-48")
    opened = hf.open_folder(folder / "hf")
    return opened.text, AutoTokenizer.from_pretrained(folder / "hf"), AutoTokenizer.from_pretrained(folder / "base"), opened.vocab


@settings(max_examples=150)
@given(words=ANY_TEXT)
def test_text_has_the_ids_of_the_base(both: tuple[TextTokenizer, Any, Any, Vocab], words: str) -> None:
    text, exported, base, _ = both
    ids = text.encode(words)
    assert ids == base(words, split_special_tokens=True)["input_ids"] == text.encode_all([words, "a", words])[2]
    assert text.decode(ids) == base.decode(ids)
    if "<\ufdd0" not in words:  # the mark, which only the template writes
        assert ids == exported(words, split_special_tokens=True)["input_ids"]
    assert max(ids, default=0) < tiny_base.TOKENS


@settings(max_examples=150)
@given(asked=ANY_TEXT, answered=ANY_TEXT)
@example(asked="<\ufdd0eos>", answered="<<\ufdd0think>")
def test_what_is_typed_into_a_template_is_text(both: tuple[TextTokenizer, Any, Any, Vocab], asked: str, answered: str) -> None:
    text, exported, _, vocab = both
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    theirs = exported.apply_chat_template(turns, tokenize=True, return_dict=False)
    assert theirs == chat.conversation(turns, vocab, text.encode).ids.tolist()


def test_control_tokens_and_codes_have_their_ids(both: tuple[TextTokenizer, Any, Any, Vocab]) -> None:
    _, exported, _, vocab = both
    ids = list(range(vocab.text_size, vocab.size))
    names = [vocab.token_name(i) for i in ids]
    # where transformers puts a normalizer of its own, names have a semicolon
    assert exported.convert_ids_to_tokens(ids) in (names, [f"{name[:-1]};>" for name in names])
    assert exported("".join(exported.convert_ids_to_tokens(ids)))["input_ids"] == ids
    assert len(exported) == vocab.size
    assert (exported.bos_token_id, exported.eos_token_id, exported.pad_token_id) == (vocab.bos, vocab.eos, vocab.pad)


def test_an_adopted_tokenizer_is_kept_in_one_file(made: Path, tmp_path: Path) -> None:
    from_folder, kept = (TextTokenizer.load(made / "qwen2" / name) for name in ("base", "start/text.model"))
    assert from_folder.fingerprint == kept.fingerprint and kept.size == tiny_base.ROWS and kept.used == tiny_base.TOKENS
    kept.save(tmp_path / "text.model")
    assert TextTokenizer.load(tmp_path / "text.model").encode("<think> a red star") == from_folder.encode("<think> a red star")


# Training on ----------------------------------------------------------------------------------------------------------


TWO = {"tp 2": Parallel(ranks=2, tp=2), "pp 2": Parallel(ranks=2, pp=2)}
TWO_EXPERTS = {"ep 2": Parallel(ranks=2, ep=2), "tp 2": Parallel(ranks=2, tp=2), "pp 2": Parallel(ranks=2, pp=2)}


@pytest.mark.parametrize(("kind", "layouts"), [
    ("qwen2", TWO), pytest.param("llama", TWO, marks=pytest.mark.slow), pytest.param("qwen3_moe", TWO_EXPERTS, marks=pytest.mark.slow)])
def test_any_layout_starts_from_the_same_weights(made: Path, kind: str, layouts: dict[str, Parallel], tmp_path: Path) -> None:
    start = made / kind / "start"
    # other padding of the vocabulary than was imported
    model = replace(read_model(start)[0], vocab_multiple=96)
    recipe = tiny(tmp_path, steps=4, global_batch=2, init=start, model=model)
    assert violations(recipe) == []
    losses_from((recipe, {"one": Parallel()}))                                  # in this process
    rounded = replace(recipe, precision="bf16", out=tmp_path / "bf16")
    losses_from((rounded, {"one": Parallel()}))                                 # its fp32 masters start there too
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))
        launch("warm_ranks:losses_from", (recipe, layouts), 2)
    expected = json.loads((tmp_path / "losses_1.json").read_text())["one"]
    for name, found in json.loads((tmp_path / "losses_2.json").read_text()).items():
        assert found == pytest.approx(expected, rel=1e-4), name
    assert expected[3] < expected[0]
    assert json.loads((rounded.out / "losses_1.json").read_text())["one"] == pytest.approx(expected, rel=0.02)


def test_the_commands_import_train_and_export(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mmllm.cli import run
    from mmllm.generate.engine import Engine
    from mmllm.megatron.train import train
    base, start, visual = made / "qwen3" / "base", tmp_path / "start", made / "visual-2-48"
    run(["import", str(base), str(start), "--tokenizer", str(visual)])
    said = capsys.readouterr().out
    assert "model=Model(num_layers=2, hidden_size=32" in said
    tokens = tiny_model.token_shards(made / "tokens", text=TextTokenizer.load(base))
    model, size = read_model(start)
    assert repr(eval(said.partition("model=")[2], {"Model": type(model)})) == repr(model)
    recipe = tiny(tmp_path / "run", steps=2, init=start, model=model, optim=Optim(lr=1e-3),
                  data=DataConfig(shards=tokens, row_len=256))
    train(recipe)
    trained = str(tmp_path / "run/checkpoints/step_0000002")
    run(["export", trained, str(tmp_path / "hf"), "--tokens", str(tokens), "--tokenizer", str(visual), "--text", str(start / "text.model"),
         "--dtype", "bf16"])
    engine = Engine.load(tmp_path / "hf")
    assert engine.folder.max_len == 128 and engine.folder.vocab.size == size and engine.draw(["a red star"]).shape == (1, 1, 2, 3, 3)
    before, after = (streams.read(folder)["model.layers.0.mlp.up_proj.weight"].make().float() for folder in (base, tmp_path / "hf"))
    assert 0 < (before - after).abs().max() < 0.02  # trained on, not anew
    with pytest.raises(ValueError, match="name the token shards it was trained on"):
        run(["export", trained, str(tmp_path / "other"), "--tokenizer", str(visual)])
    with pytest.raises(ValueError, match=r"start has .* ids, the token shards"):
        train(replace(recipe, out=tmp_path / "other", data=replace(recipe.data, shards=tiny_model.token_shards(made / "other"))))


def test_a_recipe_of_another_shape_is_told_which(made: Path, tmp_path: Path) -> None:
    model = read_model(made / "qwen2" / "start")[0]
    wrong = tiny(tmp_path, init=made / "qwen2" / "start", model=replace(model, ffn_hidden_size=64, qkv_bias=False, init_std=1.0))
    lines = violations(wrong)
    assert len(lines) == 2 and any("model.ffn_hidden_size is 64, that of init 48" in line for line in lines)
    assert "has no state.json" in violations(tiny(tmp_path, init=tmp_path))[0]


# What is refused ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("changes", "words"), [
    ({"model_type": "mixtral"}, "model_type 'mixtral' is none of llama, qwen2, qwen3, qwen3_moe"),
    ({"model_type": "qwen3_moe", "num_experts": 4, "norm_topk_prob": False}, "norm_topk_prob False"),
    ({"use_sliding_window": True}, "use_sliding_window True"),
    ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
    ({"attention_bias": True}, "attention_bias True"),
    ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic'"),
    ({"intermediate_size": 64}, r"gate_proj.weight is \[48, 32\], config.json asks for \[64, 32\]"),
    ({"num_hidden_layers": 3}, "hold no model.layers.2"),
    ({"num_hidden_layers": 1}, "hold model.layers.1"),
    ({"vocab_size": 370}, "ids up to 379, its embedding 370 rows"),
])
def test_what_our_model_lacks_is_refused_by_name(made: Path, tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    shutil.copytree(made / "qwen2" / "base", tmp_path / "base")
    path = tmp_path / "base" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ValueError, match=words):
        adopt(tmp_path / "base", tmp_path / "start", made / "visual-2-48")
    assert not (tmp_path / "start").exists()


def test_a_missing_or_cut_file_is_named(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "qwen2" / "base", tmp_path / "base")
    path = sorted((tmp_path / "base").glob("*.safetensors"))[1]
    data = path.read_bytes()
    path.write_bytes(data[:-10])
    with pytest.raises(ValueError, match=path.name):
        adopt(tmp_path / "base", tmp_path / "start", made / "visual-2-48")
    path.unlink()
    with pytest.raises(FileNotFoundError, match=path.name):
        adopt(tmp_path / "base", tmp_path / "start", made / "visual-2-48")
    (tmp_path / "base" / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        adopt(tmp_path / "base", tmp_path / "start", made / "visual-2-48")
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


def test_an_interrupted_or_changed_import_is_not_started_from(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "qwen2" / "start", tmp_path / "start")
    path = next((tmp_path / "start").glob("*.distcp"))
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=path.name):
        export(tmp_path / "start", tmp_path / "hf", None, None, made / "visual-2-48")
    assert not (tmp_path / "hf").exists()
