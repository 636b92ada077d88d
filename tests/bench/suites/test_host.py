"""Host times need a stub of the driver; tests/impl/triton/test_host.py runs them where it is."""

import pytest

pytest.importorskip("triton")

from bench.suites import host


def test_without_the_stub_it_says_what_it_needs(monkeypatch, capsys):
    monkeypatch.setattr(host, "find_spec", lambda name: None)
    assert host.main([]) == 2
    assert (
        capsys.readouterr().err == "python -m bench.suites.host: error: needs the module cudastub\n"
    )
