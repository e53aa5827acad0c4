"""The Hugging Face folder: what stock classes make of it, and what is said about a broken one."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_model
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from data import chat
from mmllm import hf
from tokenizer.model import VisualTokenizer


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.folder(tmp_path_factory.mktemp("hf") / "plain")


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model.folder(tmp_path_factory.mktemp("hf") / "tuned", chat=True)


@pytest.fixture
def broken(plain: Path, tmp_path: Path) -> Path:
    shutil.copytree(plain, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture(scope="module")
def fast(plain: Path):
    from transformers import AutoTokenizer
    return AutoTokenizer.from_pretrained(plain)


@pytest.mark.parametrize(("norm", "tie", "name"),
                         [(True, False, "Qwen3"), (False, False, "Llama"), (True, True, "Qwen3")])
def test_stock_classes_open_the_folder_with_the_weights_given(tmp_path: Path, norm: bool, tie: bool, name: str) -> None:
    from transformers import AutoModelForCausalLM
    folder = tiny_model.folder(tmp_path / "m", qk_layernorm=norm, tie_embeddings=tie)
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert type(model).__name__ == f"{name}ForCausalLM"
    assert not info["missing_keys"] and not info["unexpected_keys"]
    shape = tiny_model.model(qk_layernorm=norm, tie_embeddings=tie, head_dim=8)
    given = tiny_model.weights(shape, tiny_model.vocabulary().size)
    assert all(torch.equal(model.get_parameter(key), tensor) for key, tensor in given.items())
    assert hf.read_model(hf.open_folder(folder).config) == shape


TYPED = ["<eos>", "<unk>", "<boi><grid_3x3><image_0_00001>", "<assistant>", "<", "<\ufdd0", "\ufdd0", "<0x41>", "<|unused_3|>", "a<b",
         "<<eos>"]
ANY_TEXT = st.one_of(st.text(max_size=40), st.text("a red blue\t\n ▁é漢🎨?.0", max_size=30),
                     st.lists(st.sampled_from([*TYPED, "a red", " ", "star"]), max_size=6).map("".join),
                     st.integers(0, 10_000).map(lambda seed: tiny_model.sentences(1, seed)[0]))


@settings(max_examples=300, deadline=None)
@given(ANY_TEXT)
def test_both_tokenizers_give_the_same_ids_and_text(fast, words: str) -> None:
    """But for the mark, which only the template writes."""
    assume("<\ufdd0" not in words)
    text = tiny_model.text_tokenizer()
    ids = fast(words, split_special_tokens=True)["input_ids"]
    assert ids == text.encode(words) and fast.decode(ids) == text.decode(ids)


@settings(max_examples=200, deadline=None)
@given(ANY_TEXT, ANY_TEXT)
def test_what_a_user_types_is_never_a_control_token(fast, asked: str, answered: str) -> None:
    turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    theirs = fast.apply_chat_template(turns, tokenize=True, return_dict=False)
    assert theirs == chat.conversation(turns, tiny_model.vocabulary(), tiny_model.text_tokenizer().encode).ids.tolist()


def test_every_control_token_and_image_code_is_one_token_with_its_id(fast) -> None:
    vocab = tiny_model.vocabulary()
    names = [vocab.token_name(i) for i in range(vocab.text_size, vocab.size)]
    assert fast("".join(names))["input_ids"] == list(range(vocab.text_size, vocab.size))
    assert len(fast) == vocab.size and fast.decode(fast("<boi><image_1_00003>a star")["input_ids"], True) == "a star"
    assert (fast.bos_token_id, fast.eos_token_id, fast.pad_token_id) == (vocab.bos, vocab.eos, vocab.pad)


def test_the_chat_template_writes_what_the_model_was_tuned_on(tuned: Path) -> None:
    from transformers import AutoTokenizer
    tokenizer, vocab, text = AutoTokenizer.from_pretrained(tuned), tiny_model.vocabulary(), tiny_model.text_tokenizer()
    shown, drawn = ({"type": "image", "codes": np.arange(3 * 2 * h).reshape(2, h, 3).tolist()} for h in (3, 2))
    turns = [{"role": "system", "content": "the colour is red"},
             {"role": "user", "content": [shown, {"type": "text", "text": "how many?"}, drawn]},
             {"role": "assistant", "content": "two <eos>."},
             {"role": "user", "content": "draw a star"}, {"role": "assistant", "content": [drawn]}]
    for said in (turns, turns[1:], turns[1:3]):
        whole = tokenizer.apply_chat_template(said, tokenize=True, return_dict=False)
        assert whole == chat.conversation(said, vocab, text.encode).ids.tolist()
        asked = tokenizer.apply_chat_template(said[:-1], tokenize=True, add_generation_prompt=True, return_dict=False)
        assert asked == chat.prompt(said[:-1], vocab, text.encode)
    for wrong in (turns[2:], [turns[0], turns[0]], [turns[1], turns[1]], [{"role": "tool", "content": ""}]):
        with pytest.raises(Exception, match="user and assistant alternate"):
            tokenizer.apply_chat_template(wrong)


def test_large_weights_are_split_and_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM
    monkeypatch.setattr(hf, "SHARD_BYTES", 40_000)
    folder = tiny_model.folder(tmp_path / "m")
    assert len(list(folder.glob("model-*.safetensors"))) > 1 and not (folder / "model.safetensors").exists()
    read, theirs = hf.open_folder(folder).tensors(), AutoModelForCausalLM.from_pretrained(folder)
    assert all(torch.equal(theirs.get_parameter(name), tensor) for name, tensor in read.items())


def test_the_fingerprint_is_that_of_the_tokenizer_inside(plain: Path) -> None:
    assert hf.fingerprint(plain / "visual_tokenizer") == VisualTokenizer.load(plain / "visual_tokenizer").fingerprint


def test_a_failed_write_leaves_what_was_there(plain: Path, broken: Path) -> None:
    before = sorted(p.name for p in broken.iterdir())
    with pytest.raises(RuntimeError), hf.replaced(broken) as folder:
        (folder / "config.json").write_text("{}")
        raise RuntimeError("the disk is full")
    assert sorted(p.name for p in broken.iterdir()) == before
    assert [p.name for p in broken.parent.iterdir()] == ["model"]


def test_a_folder_of_something_else_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_bytes(b"")
    with pytest.raises(ValueError, match="photos exists and is not a model folder"), hf.replaced(tmp_path / "photos"):
        pass
    assert [p.name for p in (tmp_path / "photos").iterdir()] == ["cat.png"]


def test_padding_rows_are_refused(tmp_path: Path, broken: Path) -> None:
    vocab, shape = tiny_model.vocabulary(), tiny_model.model()
    with pytest.raises(ValueError, match="drop the padding rows"):
        hf.write_folder(tmp_path / "new", tiny_model.weights(shape, vocab.size + 5), shape, vocab,
                        broken / "text.model", broken / "visual_tokenizer", chat=False)
    assert not (tmp_path / "new").exists()


def test_no_folder_and_a_strange_folder_are_told_apart(tmp_path: Path, broken: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no model folder"):
        hf.open_folder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is not a model folder: give one"):
        hf.open_folder(tmp_path)
    (broken / "mmllm.json").unlink()
    with pytest.raises(ValueError, match="not a model folder: it has a config"):
        hf.open_folder(broken)


@pytest.mark.parametrize("name", ["config.json", "vocab.json", "text.model", "tokenizer.json", "model.safetensors",
                                  "visual_tokenizer/model.safetensors"])
def test_a_missing_file_is_named(broken: Path, name: str) -> None:
    (broken / name).unlink()
    with pytest.raises(FileNotFoundError, match=Path(name).name):
        hf.open_folder(broken)


def test_another_visual_tokenizer_is_refused(broken: Path) -> None:
    path = broken / "visual_tokenizer" / "model.safetensors"
    tensors = load_file(path)
    name = next(iter(tensors))
    save_file({**tensors, name: tensors[name] + 1}, path)
    with pytest.raises(ValueError, match="visual_tokenizer has fingerprint"):
        hf.open_folder(broken)


def test_a_vocabulary_of_another_size_is_refused(broken: Path) -> None:
    fields = json.loads((broken / "vocab.json").read_text())
    (broken / "vocab.json").write_text(json.dumps({**fields, "codebook_size": 47}))
    with pytest.raises(ValueError, match="vocab_size"):
        hf.open_folder(broken)


def test_truncated_weights_are_named(broken: Path) -> None:
    path = broken / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is no whole safetensors file"):
        hf.open_folder(broken).tensors()
