"""The check scripts run as a student runs them."""

import subprocess
import sys

import numpy as np
import pytest
import torch

import optimizer_test
import rope_test
from conftest import ROOT, shared_asset
from rope import apply_rotary_emb


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("optimizer_test.py", "Optimizer test passed!"),
        ("rope_test.py", "Rotary embedding test passed!"),
    ],
)
def test_checks_pass_from_any_folder(script, words, tmp_path):
    command = [sys.executable, str(ROOT / script)]
    ended = subprocess.run(
        command, capture_output=True, encoding="utf-8", cwd=tmp_path, check=False
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.endswith(f"{words}\n")


def halves_paired(query, key, head_dim, max_seq_len):
    order = torch.arange(head_dim).view(2, -1).T.flatten()  # 0, D/2, 1, D/2 + 1, ...
    turned = apply_rotary_emb(query[..., order], key[..., order], head_dim, max_seq_len)
    return tuple(x[..., order.argsort()] for x in turned)


def key_is_nan(query, key, *sizes):
    return apply_rotary_emb(query, key, *sizes)[0], key * torch.nan


@pytest.mark.parametrize("wrong", [halves_paired, key_is_nan])
def test_rope_check_sees_a_wrong_rotation(wrong, monkeypatch, capsys):
    monkeypatch.setattr(rope_test, "apply_rotary_emb", wrong)
    assert rope_test.main() == 1
    assert "failed" in capsys.readouterr().out


def test_reference_constants_are_the_published_files():
    published = np.load(shared_asset("reference/optimizer_test.npy"))
    np.testing.assert_allclose(optimizer_test.REFERENCE.numpy(), published, atol=1e-6)


def test_published_rotation_is_reproduced():
    path = shared_asset("reference/rotary_embedding_actual.data")
    expected = torch.load(path, weights_only=True)
    query, key = 2 * torch.ones(1, 2, 2, 4), 3 * torch.ones(1, 2, 2, 4)
    for ours, theirs in zip(apply_rotary_emb(query, key, 4, 20), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
