"""A SentencePiece model in the forms that other programs read.

- `tokenizer.json` of the package `tokenizers`, with which transformers' AutoTokenizer needs neither
  SentencePiece nor protobuf. Both run byte-pair encoding (Sennrich et al. 2016, arXiv 1508.07909)
  on characters: SentencePiece joins the neighbors whose piece has the highest score, the leftmost
  first, `tokenizers` those whose pair stands first in a list of merges. So the list is all ways to
  split each piece in two, by falling score.
- `tokenizer.bin` of llama2.c: max_token_length, then each token's score, length and bytes.
"""

import struct
from collections import Counter
from collections.abc import Iterator
from typing import Any

from tokenizer import Tokenizer

SPACE = "▁"  # U+2581, which SentencePiece writes for a space
_BPE, _USER_DEFINED = 2, 4  # of TrainerSpec.ModelType and of SentencePiece.Type


def tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """What `tokenizers` encodes and decodes by as `tokenizer` does, bos first, pieces alone.

    Control pieces are declared, and not looked for in a text (`tokenizer_config`). A ValueError
    says what a model has that this form cannot hold, or not so that all texts get the same tokens.
    """
    sp = tokenizer.sp_model
    normalizer = _require_plain(tokenizer)
    pieces = [sp.id_to_piece(i) for i in range(len(sp))]
    score = {pieces[i]: sp.get_score(i) for i in range(len(sp)) if _is_normal(sp, i)}
    _require_order(score)
    pairs = [
        (-score[piece], -i, piece[:i], piece[i:])
        for piece in score
        for i in range(1, len(piece))
        if piece[:i] in score and piece[i:] in score
    ]
    # Runs of one character may share a score (Llama's spaces do): there the leftmost grows first,
    # which is that of two pairs the one with the longer left side comes first.
    merges = [f"{left} {right}" for *_, left, right in sorted(pairs, key=lambda pair: pair[:2])]
    bos = pieces[tokenizer.bos_id]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(i, pieces[i]) for i in sorted(set(_special_ids(tokenizer)))],
        "normalizer": {"type": "Sequence", "normalizers": _normalizers(*normalizer)},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [_special(bos, 0), _sequence("A", 0)],
            "pair": [_special(bos, 0), _sequence("A", 0), _special(bos, 1), _sequence("B", 1)],
            "special_tokens": {bos: {"id": bos, "ids": [tokenizer.bos_id], "tokens": [bos]}},
        },
        "decoder": {"type": "Sequence", "decoders": _decoders(*normalizer)},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": pieces[sp.unk_id()],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {piece: i for i, piece in enumerate(pieces)},
            "merges": merges,
        },
    }


def tokenizer_config(tokenizer: Tokenizer, max_seq_len: int, has_json: bool) -> dict[str, Any]:
    """What transformers wants to know beside `tokenizer.json`, or beside `tokenizer.model`."""
    pieces = tokenizer.sp_model.id_to_piece(_special_ids(tokenizer))
    names = ("unk_token", "bos_token", "eos_token", "pad_token")
    return {
        "tokenizer_class": "PreTrainedTokenizerFast" if has_json else "LlamaTokenizer",
        **dict(zip(names, pieces, strict=True)),
        "split_special_tokens": True,  # "<s>" in a text is three characters
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_seq_len,
        "model_input_names": ["input_ids", "attention_mask"],  # all that a Llama takes
    }


def tokenizer_bin(tokenizer: Tokenizer) -> bytes:
    """llama2.c's file: spaces as such, and bos and eos between newlines, as its training saw them.

    int32 max_token_length, then for each token float32 score, int32 length, bytes.
    """
    sp = tokenizer.sp_model
    tokens = [sp.id_to_piece(i).replace(SPACE, " ") for i in range(len(sp))]
    for i in (tokenizer.bos_id, tokenizer.eos_id):
        tokens[i] = f"\n{tokens[i]}\n"
    encoded = [token.encode() for token in tokens]
    parts = [struct.pack("<i", max(map(len, encoded)))]
    for i, token in enumerate(encoded):
        parts += [struct.pack("<fi", sp.get_score(i), len(token)), token]
    return b"".join(parts)


def unknown_to_llama2c(tokenizer: Tokenizer) -> str | None:
    """For what run.c may split a text otherwise; None where it has the same rules.

    It has the numbers 1 and 2 for beginning and end, and those from 3 on for the bytes.
    """
    try:
        adds_space, is_trimmed = _require_plain(tokenizer)
    except ValueError as error:
        return str(error)
    if (tokenizer.bos_id, tokenizer.eos_id, tokenizer.sp_model.piece_to_id("<0x00>")) != (1, 2, 3):
        return "other numbers for beginning, end or bytes"
    if not adds_space:
        return "no space before a text"
    return "extra spaces taken out" if is_trimmed else None


# ---------------------------------------------------------------- what tokenizer.json can hold


def _require_plain(tokenizer: Tokenizer) -> tuple[bool, bool]:
    """(whether a text gets a space before it, whether further spaces are taken out)."""
    pieces, specs = [], {2: b"", 3: b""}
    for number, value in _fields(tokenizer.sp_model.serialized_model_proto()):
        if number == 1:
            pieces.append(dict(_fields(value)))
        elif number in specs:
            specs[number] = value
    trainer, normalizer = dict(_fields(specs[2])), dict(_fields(specs[3]))
    faults = {
        "a model that is not BPE": trainer.get(3, 1) != _BPE,
        "a model without byte fallback": not trainer.get(35, 0),
        "a space behind the text": trainer.get(24, 0),
        "a table of normalization": normalizer.get(2, b""),
        "spaces that are not escaped": not normalizer.get(5, 1),
        "user-defined pieces": any(piece.get(3) == _USER_DEFINED for piece in pieces),
        "unused pieces": any(map(tokenizer.sp_model.is_unused, range(len(pieces)))),
    }
    for fault, is_there in faults.items():
        if is_there:
            raise ValueError(fault)
    return bool(normalizer.get(3, 1)), bool(normalizer.get(4, 1))


def _require_order(score: dict[str, float]) -> None:
    """ValueError where equal scores let the text's order decide, which a list of merges cannot."""
    n_pieces = Counter(score[piece] for piece in score if len(piece) > 1)
    for piece in score:
        if len(set(piece)) > 1 and n_pieces[score[piece]] > 1:
            raise ValueError("pieces with equal scores")
        if piece.startswith("#version"):  # which readers of merges take for a remark
            raise ValueError("a piece that begins with #version")


def _is_normal(sp: Any, i: int) -> bool:
    return not (sp.is_control(i) or sp.is_unknown(i) or sp.is_byte(i))


def _special_ids(tokenizer: Tokenizer) -> list[int]:
    ids = [tokenizer.sp_model.unk_id(), tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id]
    return [int(i) for i in ids]


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """(number, value) of each field of a protobuf message: integers, everything else as bytes."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        if key & 7 == 0:
            value, at = _varint(message, at)
        else:
            n = {1: 8, 5: 4}.get(key & 7)
            if n is None:
                n, at = _varint(message, at)
            value, at = message[at : at + n], at + n
        yield key >> 3, value


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """(number, where it ends): seven bits a byte, the lowest first."""
    number = shift = 0
    while message[at] > 127:
        number |= (message[at] & 127) << shift
        at, shift = at + 1, shift + 7
    return number | message[at] << shift, at + 1


# ---------------------------------------------------------------- parts of tokenizer.json


def _normalizers(adds_space: bool, is_trimmed: bool) -> list[dict[str, Any]]:
    steps = [_replace({"String": " "}, SPACE)]
    if adds_space:  # which an empty text does not get
        steps.insert(0, {"type": "Prepend", "prepend": SPACE})
    if is_trimmed:
        before = [_replace({"Regex": r"\A +"}, ""), _replace({"Regex": " {2,}"}, " ")]
        steps = [*before, *steps, _replace({"Regex": rf"{SPACE}+\z"}, "")]
    return steps


def _decoders(adds_space: bool, is_trimmed: bool) -> list[dict[str, Any]]:
    steps = [_replace({"String": SPACE}, " "), {"type": "ByteFallback"}, {"type": "Fuse"}]
    if adds_space or is_trimmed:
        n = 2**20 if is_trimmed else 1  # spaces at the text's begin
        steps.append({"type": "Strip", "content": " ", "start": n, "stop": 0})
    return steps


def _replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def _special(piece: str, text: int) -> dict[str, Any]:
    return {"SpecialToken": {"id": piece, "type_id": text}}


def _sequence(name: str, text: int) -> dict[str, Any]:
    return {"Sequence": {"id": name, "type_id": text}}


def _added(i: int, piece: str) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": i, "content": piece, **flags, "special": True}
