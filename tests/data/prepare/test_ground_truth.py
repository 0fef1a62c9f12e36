"""Validation images without class folders: their classes from a file, in three forms."""

import csv
import json
import shutil

import numpy as np
import pytest
import scipy.io
from support.conversion import CLASSES, convert, encode, random_image, read_back

from pss_composer.cli import main
from pss_composer.errors import InputError

LABELS = [2, 0, 1, 2]


@pytest.fixture
def flat(tmp_path):
    folder = tmp_path / "flat"
    folder.mkdir()
    rng = np.random.default_rng(3)
    for index in range(len(LABELS)):
        (folder / f"ILSVRC2012_val_{index + 1:08}.JPEG").write_bytes(encode(random_image(rng)))
    return folder


def write_meta(path):
    """As in the development kit: numbers are not in the order of the ids, and inner nodes have children."""
    fields = [("ILSVRC2012_ID", "f8"), ("WNID", object), ("words", object), ("gloss", object), ("num_children", "f8")]
    rows = [(7, CLASSES[2], "a dog", "", 0), (1, CLASSES[0], "tench", "", 0), (3, CLASSES[1], "goldfish", "", 0),
            (1001, "n00001740", "entity", "", 3)]
    scipy.io.savemat(path, {"synsets": np.array(rows, dtype=fields)})


def write_truth(form, folder):
    folder.mkdir(exist_ok=True)
    if form == "kit":
        write_meta(folder / "meta.mat")
        numbers = {0: 1, 1: 3, 2: 7}
        path = folder / "ILSVRC2012_validation_ground_truth.txt"
        path.write_text("".join(f"{numbers[label]}\n" for label in LABELS))
    elif form == "ids":
        path = folder / "ids.txt"
        path.write_text("\n".join(CLASSES[label] for label in LABELS))
    else:
        path = folder / "LOC_val_solution.csv"
        with path.open("w") as file:
            rows = csv.writer(file)
            rows.writerow(["ImageId", "PredictionString"])
            for index, label in reversed(list(enumerate(LABELS))):
                box = f"{CLASSES[label]} 1 2 30 40 "
                rows.writerow([f"ILSVRC2012_val_{index + 1:08}", box * (1 + index % 2)])
    return path


@pytest.mark.parametrize("form", ["kit", "ids", "csv"])
def test_ground_truth(form, flat, tmp_path):
    main(["convert", str(flat), str(tmp_path / "out"), "--ground-truth", str(write_truth(form, tmp_path / "truth"))])
    images = [path.read_bytes() for path in sorted(flat.iterdir())]
    assert read_back(tmp_path / "out" / "val") == list(zip(images, LABELS, strict=True))
    assert json.loads((tmp_path / "out" / "val" / "classes.json").read_text()) == CLASSES


def test_ground_truth_has_the_classes_of_the_training_images(flat, source, tmp_path):
    (tmp_path / "source").mkdir()
    shutil.copytree(source / "train", tmp_path / "source" / "train")
    more = tmp_path / "source" / "train" / "n00000001"
    shutil.copytree(source / "train" / CLASSES[0], more)
    convert(tmp_path / "source", tmp_path / "out")
    truth = write_truth("ids", tmp_path)
    convert(flat, tmp_path / "out", ground_truth=truth)
    assert [label for _, label in read_back(tmp_path / "out" / "val")] == [label + 1 for label in LABELS]
    assert json.loads((tmp_path / "out" / "val" / "classes.json").read_text()) == ["n00000001", *CLASSES]
    truth.write_text(truth.read_text().replace(CLASSES[1], "n99999999"))
    message = "must name classes of the training images that are converted already, got 1 others, like n999"
    with pytest.raises(InputError, match="^ground_truth " + message):
        convert(flat, tmp_path / "out", ground_truth=truth)


def test_ground_truth_that_does_not_fit(flat, source, tmp_path):
    def expect(message, path, images=flat):
        with pytest.raises(InputError, match="^ground_truth " + message):
            convert(images, tmp_path / "out", ground_truth=path)

    path = write_truth("ids", tmp_path)
    expect("needs a flat folder of images, got a folder 'train' in", path, source)
    path.write_text(CLASSES[0])
    expect("must have a line per image, got 1 lines for 4 images", path)
    path.write_text("tench\n" * 4)
    expect("must hold the development kit's numbers or WordNet ids like n01440764, got 'tench' in", path)
    expect("must be a text file, got", tmp_path / "nowhere")
    path.write_text("1\n" * 4)
    expect("of the development kit needs meta.mat beside it, got '.*/meta.mat': .* No such file", path)
    (tmp_path / "meta.mat").write_text("hello")
    expect("of the development kit needs meta.mat beside it, got '.*/meta.mat': Mat file appears to be truncated", path)
    write_meta(tmp_path / "meta.mat")
    path.write_text("1\n3\n7\n1001\n")
    expect("must name classes of meta.mat, got 1001 in", path)
    path = write_truth("csv", tmp_path)
    path.write_text("\n".join(path.read_text().splitlines()[:-1]))
    missing = "only one of the two has ILSVRC2012_val_00000001"
    expect(f"must name the images of the folder, got 3 names for 4 images; {missing}", path)
    path.write_text("ImageId,PredictionString\na\n")
    expect("must have the columns ImageId,PredictionString", path)
    assert not (tmp_path / "out").exists()
