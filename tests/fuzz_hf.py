"""Fuzz target of `tools.export --from hf`: config.json, safetensors, an index of files."""

import json
import struct
from functools import cache

from hypothesis import strategies as st

from formats.huggingface import hf_config, hf_weights
from fuzz import Inputs
from fuzz_models import tiny
from fuzz_shared import JSON_TEXTS, JSON_VALUES, ODD_FLOATS, ODD_INTS, mutated
from tools import export

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def act_hf() -> None:
    export.main([".", "--from", "hf", "out.pt"])


def safetensors(header: bytes, numbers: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header + numbers


def as_json(value: object) -> bytes:
    return json.dumps(value).encode("utf-8", "surrogatepass")  # a key may be half a letter


@cache
def whole_parts() -> tuple[dict, bytes]:
    """(header, numbers) of the tiny model's file."""
    header, numbers = {}, b""
    for name, tensor in hf_weights(tiny()).items():
        content = tensor.detach().numpy().astype("<f4").tobytes()
        place = [len(numbers), len(numbers) + len(content)]
        header[name] = {"dtype": "F32", "shape": [*tensor.shape], "data_offsets": place}
        numbers += content
    return header, numbers


ODD_SIZES = st.sampled_from([*ODD_INTS, 2**40, 2**63, 10**100, 1.0, True, None, "8"])
ODD_VALUES = st.one_of(
    ODD_SIZES,
    st.lists(ODD_SIZES, max_size=3),
    st.sampled_from([*ODD_FLOATS, 1e4, 0.9, "gelu", "linear", "llama", {"rope_type": "yarn"}]),
    st.sampled_from(["BF16", "F16", "F64", "F8_E4M3", "a" * 10**5, "\ud800", {"rope_theta": 5e5}]),
    JSON_VALUES,
)
STRANGE_NAMES = st.sampled_from(
    [
        *("model.layers.0.self_attn.rotary_emb.inv_freq", "model.layers.1.mlp.up_proj.weight"),
        *("model.layers.99999999999.mlp.up_proj.weight", "model.norm.bias", "lm_head.weight"),
        *("__metadata__", "norm.weight", "", "\ud800", "\n", "a" * 10**5),
    ]
)


@st.composite
def headers(draw: st.DrawFn) -> dict:
    """The tiny model's header with a few entries other than they should be."""
    header = {name: dict(entry) for name, entry in whole_parts()[0].items()}
    for _ in range(draw(st.integers(0, 3))):
        name, other = draw(st.sampled_from([*header])), draw(st.sampled_from([*header]))
        change = draw(st.integers(0, 4))
        if change == 0:
            header[draw(STRANGE_NAMES)] = header.pop(name)
        elif change == 1:
            header[name], header[other] = header[other], header[name]
        elif change == 2:
            header[name] = draw(ODD_VALUES)
        elif isinstance(header[name], dict):
            key = draw(st.sampled_from(["dtype", "shape", "data_offsets", "x"]))
            value = draw(ODD_VALUES)
            sizes = header[name].get(key)
            if isinstance(sizes, list) and sizes and change == 3:
                at = draw(st.integers(0, len(sizes) - 1))
                value = [*sizes[:at], draw(ODD_SIZES), *sizes[at + 1 :]]
            header[name] = {**header[name], key: value}
    return header


@st.composite
def configs(draw: st.DrawFn) -> bytes:
    config = hf_config(tiny())
    for _ in range(draw(st.integers(0, 3))):
        key = draw(st.sampled_from([*config, "head_dim", "rope_scaling", "quantization_config"]))
        if draw(st.booleans()):
            config[key] = draw(ODD_VALUES)
        else:
            config.pop(key, None)
    return as_json(config)


@st.composite
def hf_files(draw: st.DrawFn) -> Inputs:
    header, numbers = whole_parts()
    files = {
        "config.json": as_json(hf_config(tiny())),
        WHOLE: safetensors(as_json(header), numbers),
    }
    kind = draw(st.integers(0, 6))
    if kind == 0:
        name = draw(st.sampled_from([*files]))
        files[name] = draw(mutated(files[name]))
    elif kind <= 2:
        files["config.json"] = draw(configs() | st.sampled_from(JSON_TEXTS))
    elif kind <= 4:
        content = draw(headers().map(as_json) | st.sampled_from(JSON_TEXTS))
        files[WHOLE] = safetensors(content, draw(st.sampled_from([numbers, numbers * 2, b""])))
    elif kind == 5:  # numbers that are none
        at = 4 * draw(st.integers(0, len(numbers) // 4 - 1))
        odd = struct.pack("<f", draw(st.sampled_from([f for f in ODD_FLOATS if f != 1e300])))
        files[WHOLE] = safetensors(as_json(header), numbers[:at] + odd + numbers[at + 4 :])
    else:
        files["part.safetensors"] = files.pop(WHOLE)
        places: dict = dict.fromkeys(header, "part.safetensors")
        for _ in range(draw(st.integers(0, 2))):
            name = draw(st.sampled_from([*header]) | STRANGE_NAMES)
            other = st.sampled_from(["config.json", "../part.safetensors", "/etc/passwd", "", "."])
            places[name] = draw(other | ODD_VALUES)
        index = st.sampled_from([{"weight_map": places}] * 4) | JSON_VALUES
        files[INDEX] = draw(index.map(as_json) | st.sampled_from(JSON_TEXTS))
    return files
