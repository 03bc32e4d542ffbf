"""The int8 table: its perplexity against one computed here, and both kinds of weights."""

import math

import pytest
import torch
import torch.nn.functional as F

from benchmarks import int8
from conftest import ROOT
from llama import load_pretrained
from tokenizer import Tokenizer


def test_the_table_has_the_perplexity_of_the_text_and_a_smaller_int8_file(
    tmp_path, capsys, monkeypatch
):
    operator, limits = torch._weight_int8pack_mm, []  # the operator is for few rows

    def watched(*args):
        limits.append(int8.int8.MAX_ROWS)
        return operator(*args)

    monkeypatch.setattr(torch, "_weight_int8pack_mm", watched)
    model_path, text, data = ROOT / "data/mini/model.pt", "A warm film about a family.", "data.txt"
    (tmp_path / "text.txt").write_text(f"3 ||| {text}\n", encoding="utf-8")
    (tmp_path / data).write_text("3 ||| a warm film\n0 ||| a bad one\n", encoding="utf-8")
    options = ("--text", str(tmp_path / "text.txt"), "--data", str(tmp_path / data))
    int8.main(["--model", str(model_path), *options])
    _, _, many, few, zero_shot, file = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in capsys.readouterr().out.splitlines()
    ]
    tokenizer = Tokenizer(tokenizer_model=ROOT / "data/mini/tokenizer.model")
    ids = torch.tensor([*tokenizer.encode(text, bos=True, eos=False), tokenizer.bos_id])
    with torch.no_grad():
        logits, _ = load_pretrained(model_path, "causal").double()(ids[None, :-1], targets=ids)
    perplexity = math.exp(F.cross_entropy(logits[0], ids[1:]))
    for name, float32, quantized in (many, few):
        assert name.startswith(f"perplexity of {len(ids) - 1} tokens")
        assert float(float32) == pytest.approx(perplexity, rel=1e-4)
        assert 0 < abs(float(quantized) / perplexity - 1) < 0.05
    assert 10**9 in limits and 0 not in limits  # for the row of few rows, not for that of many
    assert zero_shot[0] == "zero-shot accuracy of 2 sentences"
    assert float(file[2].split()[0]) < 0.3 * float(file[1].split()[0])
