"""The reading of a tokenizer.json: whether the library would take it, and what it says beside its vocabulary."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

from grpo_toolkit.doctor.parsed_folder import MIB, TOKENIZER, TOKENIZER_PARTS, Tokenizer, token_text
from grpo_toolkit.errors import CheckpointError

if TYPE_CHECKING:
    from grpo_toolkit.checkpoint.json_files import JsonObject
    from grpo_toolkit.doctor.planned_files import Files

_LIMIT: Final = 18 * MIB
"""The largest that is read whole (Llama 3's has 17 MB); larger ones are not judged."""
_CONTAINERS: Final = 1_000_000
"""The most objects and lists: a merge is a list of two, and Gemma's has half a million of them."""


def read_tokenizer(files: Files, config: JsonObject | None) -> Tokenizer | None:
    """Return what a folder's tokenizer.json says, or None where there is none to read, or an empty one."""
    entry = files.entries.get(TOKENIZER)
    if entry is None or not entry.is_regular or entry.leaves or not 0 < entry.size <= _LIMIT:
        return None
    try:
        raw = files.read(TOKENIZER, limit=_LIMIT)
    except CheckpointError:
        return None
    return _read(raw, _named(config or {}))


def _named(config: JsonObject) -> frozenset[str]:
    """Return the special tokens that the config names and does not add itself."""
    texts = (token_text(value) for key, value in config.items() if key.endswith("_token"))
    decoder = config.get("added_tokens_decoder")
    entries = decoder.values() if isinstance(decoder, dict) else ()
    added = {
        entry["content"] for entry in entries if isinstance(entry, dict) and isinstance(entry.get("content"), str)
    }
    return frozenset(text for text in texts if text is not None) - added


@lru_cache(maxsize=2)  # the checkpoints of a run have the same, and its parsing takes longer than all the rest
def _read(raw: bytes, named: frozenset[str]) -> Tokenizer | None:
    if raw.count(b"[") + raw.count(b"{") > _CONTAINERS:
        return None
    try:
        content = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        return Tokenizer(fault=f"not JSON in UTF-8 ({str(error)[:80]})")
    if not isinstance(content, dict):
        return Tokenizer(fault=f"a {type(content).__name__}, not an object")
    key, fault = _fault_in(content)
    if fault:
        return Tokenizer(fault=fault, key=key)
    parts = {part: content.get(part) for part in TOKENIZER_PARTS}
    step = parts["pre_tokenizer"]
    if isinstance(step, dict) and not content["model"].get("merges"):  # single bytes are cut alike
        parts["pre_tokenizer"] = {key: value for key, value in step.items() if key != "use_regex"}
    has_added = "added_tokens" in content
    return Tokenizer(parts=parts, unknown=_unknown(content, named), size=_size(content), has_added=has_added)


def _fault_in(content: dict[str, Any]) -> tuple[str, str]:
    """Return the first part that the library cannot take, and the reason; two empty texts where it takes all."""
    model = content.get("model")
    if not isinstance(model, dict):
        return "model", "absent" if model is None else f"a {type(model).__name__}, not an object"
    if not isinstance(model.get("vocab"), (dict, list)):
        return "model.vocab", "no vocabulary"
    if content.get("version", "1.0") != "1.0":
        return "version", f"{json.dumps(content['version'])[:40]}, not 1.0"
    added = content.get("added_tokens", [])
    if not isinstance(added, list) or not all(isinstance(one, dict) for one in added):
        return "added_tokens", "not a list of tokens"
    others = sorted(set(content) - _KEYS)
    if others:
        return others[0], "a key that the format does not have"
    for part in TOKENIZER_PARTS:
        value = content.get(part)
        if value is None:
            continue
        if not isinstance(value, dict):
            return part, "neither null nor an object"
        kind = value.get("type")
        if part == "post_processor":  # told by its fields alone
            if kind is None and not value:
                return part, "an empty object"
            strange = _no_template(value) if kind == "TemplateProcessing" else ""
            if strange:
                return f"{part}.{strange}", "no list of pieces" if strange != "special_tokens" else "no object"
        elif not isinstance(kind, str) or kind not in _TYPES[part]:
            return f"{part}.type", f"{json.dumps(value.get('type'))[:40]}, no type of this part"
        for key, flag in value.items():
            if key in _FLAGS and not isinstance(flag, bool):
                return f"{part}.{key}", f"{json.dumps(flag)[:40]}, not true or false"
        for key in _REQUIRED.get(kind, ()) if isinstance(kind, str) else ():
            if key not in value:
                return f"{part}.{key}", "absent"
    return "", ""


def _no_template(value: dict[str, Any]) -> str:
    """Return the field of a template of pieces that is none; empty where all are."""
    if not isinstance(value.get("special_tokens"), dict):
        return "special_tokens"
    for key in ("single", "pair"):
        pieces = value.get(key)
        if not isinstance(pieces, list) or not all(isinstance(piece, dict) for piece in pieces):
            return key
    return ""


_KEYS: Final = frozenset({"version", "truncation", "padding", "added_tokens", "model", *TOKENIZER_PARTS})
_TYPES: Final = {
    "normalizer": (
        "Sequence", "NFD", "NFC", "NFKD", "NFKC", "Lowercase", "Strip", "StripAccents", "Nmt", "Precompiled",
        "Replace", "Prepend", "BertNormalizer", "ByteLevel",
    ),
    "pre_tokenizer": (
        "BertPreTokenizer", "ByteLevel", "CharDelimiterSplit", "Delimiter", "Digits", "FixedLength", "Metaspace",
        "Punctuation", "Sequence", "Split", "UnicodeScripts", "Whitespace", "WhitespaceSplit",
    ),
    "decoder": (
        "BPEDecoder", "ByteLevel", "ByteFallback", "CTC", "Fuse", "Metaspace", "Replace", "Sequence", "Strip",
        "WordPiece",
    ),
}  # fmt: skip
"""The types of the parts: https://huggingface.co/docs/tokenizers/api/pre-tokenizers and its neighbours."""
_FLAGS: Final = ("add_prefix_space", "trim_offsets", "use_regex", "individual_digits", "fuse_unk")
"""Settings of the parts that are true or false: https://docs.rs/tokenizers/latest/tokenizers/"""
_REQUIRED: Final = {
    "ByteLevel": ("add_prefix_space", "trim_offsets"),
    "TemplateProcessing": ("single", "pair", "special_tokens"),
    "Metaspace": ("replacement",),
    "Split": ("pattern", "behavior", "invert"),
    "Digits": ("individual_digits",),
}
"""The fields that the parts cannot do without, as the library says of each that a file names (`missing field`)."""


def _size(content: dict[str, Any]) -> int:
    """Return the number of ids: those of the vocabulary, and of the added tokens that it does not have."""
    vocab = content["model"]["vocab"]
    added = content.get("added_tokens", [])
    texts = (one.get("content") for one in added)
    return len(vocab) + sum(1 for text in texts if isinstance(text, str) and text not in vocab)


def _unknown(content: dict[str, Any], named: frozenset[str]) -> frozenset[str]:
    """Return those of the special tokens that the tokenizer does not have."""
    added = (entry.get("content") for entry in content.get("added_tokens", []) if isinstance(entry, dict))
    vocab = content["model"]["vocab"]
    if not vocab:
        return frozenset()
    if isinstance(vocab, list):  # pieces with their scores
        vocab = {piece[0] for piece in vocab if isinstance(piece, list) and piece and isinstance(piece[0], str)}
    known = {one for one in added if isinstance(one, str)}
    return frozenset(text for text in named if text not in known and text not in vocab)
