"""Reads that fail for the moment are tried again; others are told at once."""

import errno
import os
import time

import pytest
import torch

import lorafold as lf
from lorafold import FileError
from lorafold.files import safetensors


@pytest.fixture
def path(tmp_path):
    u = lf.LowRank(torch.randn(2, 8), torch.randn(8, 2))
    lf.save(lf.Adapter({"q_proj": u}), tmp_path / "a")
    return tmp_path / "a"


def failing(monkeypatch, number, times):
    """Have reads fail so many times."""
    calls, pauses = [], []
    real = os.preadv

    def preadv(*args):
        calls.append(args)
        if len(calls) <= times:
            raise OSError(number, os.strerror(number))
        return real(*args)

    monkeypatch.setattr(os, "preadv", preadv)
    monkeypatch.setattr(time, "sleep", pauses.append)
    return calls, pauses


@pytest.mark.skipif(not hasattr(os, "preadv"), reason="this system has no preadv")
@pytest.mark.parametrize("number", [errno.EIO, errno.ETIMEDOUT])
def test_what_passes_is_waited_for(path, monkeypatch, number):
    _, pauses = failing(monkeypatch, number, 2)
    assert lf.load(path)["q_proj"].rank == 2
    assert pauses == list(safetensors.PAUSES[:2])


@pytest.mark.skipif(not hasattr(os, "preadv"), reason="this system has no preadv")
def test_what_stays_is_told(path, monkeypatch):
    calls, pauses = failing(monkeypatch, errno.EIO, 100)
    with pytest.raises(FileError, match="Input/output error"):
        lf.load(path)
    assert len(calls) == 1 + len(safetensors.PAUSES)
    assert pauses == list(safetensors.PAUSES)


@pytest.mark.skipif(not hasattr(os, "preadv"), reason="this system has no preadv")
def test_other_errors_are_told_at_once(path, monkeypatch):
    calls, pauses = failing(monkeypatch, errno.EBADF, 100)
    with pytest.raises(FileError, match="Bad file descriptor"):
        lf.load(path)
    assert (len(calls), pauses) == (1, [])
