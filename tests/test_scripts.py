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


def test_rope_check_sees_a_wrong_pairing(monkeypatch, capsys):
    def halves(query, key, head_dim, max_seq_len):
        def swap(x):
            return x.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)

        def unswap(x):
            return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)

        turned = apply_rotary_emb(swap(query), swap(key), head_dim, max_seq_len)
        return tuple(unswap(x) for x in turned)

    monkeypatch.setattr(rope_test, "apply_rotary_emb", halves)
    assert rope_test.main() == 1
    assert "failed" in capsys.readouterr().out


def test_rope_check_sees_a_key_that_is_no_number(monkeypatch, capsys):
    monkeypatch.setattr(rope_test, "apply_rotary_emb", lambda query, key, *_: (query, key * np.nan))
    assert rope_test.main() == 1
    assert "largest difference nan" in capsys.readouterr().out


def test_reference_constants_are_the_published_files():
    published = np.load(shared_asset("reference/optimizer_test.npy"))
    np.testing.assert_allclose(optimizer_test.REFERENCE.numpy(), published, atol=1e-6)


def test_published_rotation_is_reproduced():
    path = shared_asset("reference/rotary_embedding_actual.data")
    expected = torch.load(path, weights_only=True)
    query, key = 2 * torch.ones(1, 2, 2, 4), 3 * torch.ones(1, 2, 2, 4)
    for ours, theirs in zip(apply_rotary_emb(query, key, 4, 20), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
