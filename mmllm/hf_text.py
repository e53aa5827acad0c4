"""tokenizer.json, its configuration and the chat template of an exported folder: the ids that our own encoding gives, from stock classes.

A tokenizer reads one string, in which a control token of the template and the same letters typed by a user look alike. So the template
writes what users typed in a spelling that matches no token, and that the tokenizer's normalizer turns back before text is read as text:

    most     behind every character that a control token begins with (`<`) stands `MARK`, a code point that is no character (Unicode 16.0,
             section 23.7); the normalizer takes it out again, one for each
    Qwen2    transformers 5 ignores the normalizer of such folders and puts NFC. Control tokens get a semicolon (`<eos;>`), and typed
             semicolons become U+037E, which NFC makes a semicolon again (Unicode Standard Annex 15, table 1: singletons)

Text encoded without the template is read as ours with `split_special_tokens=True`.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data.vocab import PLAIN_CONTROL, Vocab
from mmllm.progress import say
from tokenizer.base_text import BaseText
from tokenizer.text import TextTokenizer

MARK, SEMICOLON = "\ufdd0", "\u037e"

# A message is {"role", "content"}; content is a string or parts {"type": "text", "text"} and {"type": "image", "codes": [M, h, w]}
CHAT_TEMPLATE = """\
{%- macro said(words) -%}{{ words UNMARKED }}{%- endmacro -%}
{%- macro picture(codes) -%}\
{{ "BOI<grid_%dx%d>" | format(codes[0] | length, codes[0][0] | length) }}\
{%- for y in range(codes[0] | length) -%}{%- for x in range(codes[0][0] | length) -%}{%- for m in range(codes | length) -%}\
{{ "<image_%d_%05d>" | format(m, codes[m][y][x]) }}\
{%- endfor -%}{%- endfor -%}{%- endfor -%}{{ "EOI" }}{%- endmacro -%}
{{- "BOS" -}}
{%- set turns = namespace(expected=["system", "user"]) -%}
{%- for message in messages -%}\
{%- if message.role not in turns.expected -%}\
{{ raise_exception("user and assistant alternate, the user begins, behind the system at most; this is " ~ message.role) }}{%- endif -%}\
{%- set turns.expected = ["assistant"] if message.role == "user" else ["user"] -%}\
{{ {"system": "SYSTEM", "user": "USER", "assistant": "ASSISTANT"}[message.role] }}\
{%- if message.content is string -%}{{ said(message.content) }}\
{%- else -%}{%- for part in message.content -%}\
{{ "BETWEEN" if not loop.first and part.type == "text" and part.text and loop.previtem.type == "text" else "" }}\
{{ picture(part.codes) if part.type == "image" else said(part.text) if part.type == "text" else \
raise_exception("a part of a message is text, or an image with its codes; this is " ~ part.type) }}{%- endfor -%}{%- endif -%}\
{%- endfor -%}
{{- "ASSISTANT" if add_generation_prompt else "EOS" -}}"""


def write_tokenizer(folder: Path, text: TextTokenizer, vocab: Vocab, qwen2: bool = False) -> None:
    """tokenizer.json and its configuration: text pieces keep their ids, control tokens and codes are added behind them. `qwen2`: the folder
    holds a Qwen2 model, of which transformers 5 takes pieces and merges alone.

    Errors: ValueError where the file would read the name of a control token unlike our own encoding does."""
    from tokenizers import Tokenizer

    processor = text.processor
    base = processor.document if isinstance(processor, BaseText) else _of_sentencepiece(processor)
    if qwen2 and not isinstance(processor, BaseText):
        say("transformers 5 reads the tokenizer of any Qwen2 model as Qwen2's, which this is not: open it with PreTrainedTokenizerFast")
    pieces = dict(base["model"]["vocab"]) | {token["content"]: token["id"] for token in base["added_tokens"]}
    taken = set(pieces.values())
    # a tokenizer numbers added tokens itself unless its model knows them, so the model knows every id; no merge leads to these
    pieces |= {f"<|unused_{i}|>": i for i in range(vocab.text_size) if i not in taken}
    names = {i: _free(vocab.token_name(i), pieces) for i in range(vocab.text_size, vocab.size)}
    if qwen2:
        names = {i: f"{name[:-1]};>" for i, name in names.items()}
    pieces |= {name: i for i, name in names.items()}
    if len(pieces) != vocab.size:
        raise ValueError(f"the text tokenizer spells {vocab.size - len(pieces):,} ids of {vocab.text_size:,} alike: it cannot be extended")
    # our encoding never reads a special token of the base: those that no mark protects are only pieces here
    added: list[dict[str, Any]] = [token for token in base["added_tokens"] if not (qwen2 and token["special"])]
    added += [{"id": i, "content": name, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
              for i, name in names.items()]
    marks = {";": SEMICOLON} if qwen2 else {letter: letter + MARK for letter in sorted({t["content"][0] for t in added if t["special"]})}
    unmark = [{"type": "Replace", "pattern": {"String": marked}, "content": letter} for letter, marked in marks.items()]
    normalizer = {"type": "Sequence", "normalizers": unmark + ([base["normalizer"]] if base["normalizer"] else [])}
    document = {**base, "normalizer": normalizer, "added_tokens": added, "model": {**base["model"], "vocab": pieces},
                "post_processor": None}
    fast = Tokenizer.from_str(json.dumps(document))
    fast.encode_special_tokens = True
    for name in [names[i] for i in range(vocab.text_size, vocab.first_image + 1)] + ["<unk>"]:
        if fast.encode(name, add_special_tokens=False).ids != text.encode(name):
            raise ValueError(f"the text tokenizer reads the word {name} unlike tokenizer.json would: it cannot be extended")
    fast.encode_special_tokens = False
    fast.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "Qwen2Tokenizer" if qwen2 and isinstance(processor, BaseText) else "PreTrainedTokenizerFast",
                "clean_up_tokenization_spaces": False, "padding_side": "left",
                "bos_token": names[vocab.bos], "eos_token": names[vocab.eos], "pad_token": names[vocab.pad],
                **({"unk_token": names[vocab.pad]} if qwen2 else {}),  # Qwen2's class would add <|endoftext|> as one
                "chat_template": _template(names, vocab, marks, [token["content"] for token in added if not token["special"]],
                                           "" if isinstance(processor, BaseText) else " ")}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1, ensure_ascii=False) + "\n")


def _free(name: str, pieces: Mapping[str, int]) -> str:
    """How a token of ours is spelled beside a tokenizer that may have one of that name. Grids and image codes keep theirs."""
    spelled = f"<|{name[1:-1]}|>" if name in pieces and name in PLAIN_CONTROL else name
    if spelled in pieces:
        raise ValueError(f"the text tokenizer has a token {spelled} of its own: it cannot be extended")
    return spelled


def _template(names: Mapping[int, str], vocab: Vocab, marks: Mapping[str, str], plain: list[str], between: str) -> str:
    """The template with the tokens spelled as they are, and what users typed marked. Added tokens that are not special stay whole.
    `between`: what parts two texts of a turn, so that they are read as two: SentencePiece puts a space before each."""
    def marked(words: str) -> str:
        return "".join(marks.get(letter, letter) for letter in words)

    replaced = [*marks.items(), *((marked(word), word) for word in plain if marked(word) != word)]
    filters = "".join(f"| replace({json.dumps(a, ensure_ascii=False)}, {json.dumps(b, ensure_ascii=False)})" for a, b in replaced)
    end = names[vocab.first_image].removeprefix(vocab.token_name(vocab.first_image)[:-1])  # > or ;>
    out = CHAT_TEMPLATE.replace("UNMARKED", filters).replace("%d>", f"%d{end}").replace("%05d>", f"%05d{end}").replace("BETWEEN", between)
    for word, i in (("BOI", vocab.boi), ("EOI", vocab.eoi), ("BOS", vocab.bos), ("EOS", vocab.eos), ("SYSTEM", vocab.system),
                    ("USER", vocab.user), ("ASSISTANT", vocab.assistant)):
        out = out.replace(word, names[i])
    return out


def _of_sentencepiece(processor: Any) -> dict[str, Any]:
    """tokenizer.json of a SentencePiece model under its settings in `tokenizer.text`: no whitespace is squeezed, every stretch of text
    between special tokens starts with the space that SentencePiece puts there, nothing is split before the merges."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    pieces = {processor.id_to_piece(i): i for i in range(processor.get_piece_size())}
    # SentencePiece joins whichever two neighbours make the piece of lowest id: every way to make each piece, in that order
    merges = [(piece[:cut], piece[cut:]) for piece, i in pieces.items() if not (processor.is_byte(i) or processor.is_unknown(i))
              for cut in range(1, len(piece)) if piece[:cut] in pieces and piece[cut:] in pieces]
    fast = Tokenizer(models.BPE(pieces, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fast.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                      decoders.Strip(" ", 1, 0)])
    return json.loads(fast.to_str())
