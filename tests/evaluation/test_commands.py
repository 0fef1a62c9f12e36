"""The commands `evaluate`, `report` and `reconstruct`."""

import pytest
from PIL import Image

from pss_composer.cli import main
from pss_composer.evaluation import commands


def check_picture(path):
    with Image.open(path) as picture:
        assert min(picture.size) > 300 and len(picture.convert("L").getcolors()) > 20


def test_evaluate_prints_a_table(runs, capsys):
    main(["evaluate", str(runs / "digits"), "--keep-rates", "1", "0.5"])
    words = [row.split()[0] for row in capsys.readouterr().out.splitlines()]
    assert words == ["keep", "---------", "1.0", "0.5", "---------", "training,", "training,"]


def test_report_prints_a_table_and_draws_two_pictures(runs, tmp_path, capsys):
    main(["report", str(runs / "digits"), str(runs / "digits_pss"), "--out", str(tmp_path / "new" / "out")])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[0][-2:] == ["digits", "digits_pss"]
    for name in ("schedule.png", "patches.png"):
        check_picture(tmp_path / "new" / "out" / name)


def test_reconstruct_draws_a_picture(runs, tmp_path, capsys):
    out = tmp_path / "out" / "picture.png"
    main(["reconstruct", str(runs / "pretrain"), "--out", str(out)])
    assert capsys.readouterr().out == f"picture: {out}\n"
    check_picture(out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "{tmp}/none"], "RUN must be the save_folder of a trained recipe, no recipe.yaml in {tmp}/none"),
        (["evaluate", "{runs}/digits", "--keep-rates", "1.5"], "--keep-rates must be a number in (0, 1], got 1.5"),
        (["evaluate", "{runs}/pretrain"], "RUN must be of a classifier, {runs}/pretrain is of pre-training"),
        (["report", "{runs}/digits", "--out", "{tmp}/out"], "RUN must be under PSS, one at least"),
        (["reconstruct", "{runs}/digits", "--out", "{tmp}/a.png"], "RUN must be of pre-training"),
        (["reconstruct", "{runs}/pretrain", "--out", "{tmp}/a.jpg"], "--out must be a file with the suffix .png"),
    ],
)
def test_bad_input(arguments, message, runs, tmp_path):
    with pytest.raises(SystemExit) as exit_info:
        main([argument.format(tmp=tmp_path, runs=runs) for argument in arguments])
    assert exit_info.value.code.startswith("error: " + message.format(tmp=tmp_path, runs=runs))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("out", ["{tmp}/file", "{tmp}/file/out", "{tmp}/busy", "/proc/self/out"])
def test_report_finds_pictures_that_cannot_be_written_before_it_evaluates(out, runs, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "busy" / "patches.png").mkdir(parents=True)
    monkeypatch.delattr(commands, "format_table")
    with pytest.raises(SystemExit) as exit_info:
        main(["report", str(runs / "digits_pss"), "--out", out.format(tmp=tmp_path)])
    assert exit_info.value.code.startswith("error: --out must be a place that can be written, got '")
    assert "\n" not in exit_info.value.code
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("out", ["{tmp}/file/out.png", "{tmp}/folder.png", "/proc/self/out.png"])
def test_reconstruct_finds_a_picture_that_cannot_be_written_before_it_draws(out, runs, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder.png").mkdir()
    monkeypatch.delattr(commands, "plot_reconstruction")
    with pytest.raises(SystemExit) as exit_info:
        main(["reconstruct", str(runs / "pretrain"), "--out", out.format(tmp=tmp_path)])
    assert exit_info.value.code.startswith("error: --out must be a place that can be written, got '")
    assert "\n" not in exit_info.value.code
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.png"]
