"""benchmarks/bench.py: what can be said of it without measuring times."""

import bench
import pytest
import torch


@pytest.mark.parametrize("images", [8, 128])
def test_kn_keeps_no_more_for_backward_than_bn(images: int) -> None:
    kept = [bench.saved_bytes(bench._resnet18(norm), torch.device("cpu"), images) for norm in ("bkn", "bn")]
    assert 1 < kept[0] / kept[1] <= 1.05


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf", "soon"])
def test_seconds_have_a_range(seconds: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        bench.main(["--seconds", seconds])
    assert ended.value.code == 2 and "argument --seconds" in capsys.readouterr().err


def test_an_unknown_comparison_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["knn"]) == 2
    assert "unknown comparison 'knn'" in capsys.readouterr().err
