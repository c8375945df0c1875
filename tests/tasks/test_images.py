"""Images: where they come from, what becomes of them, how they are scored, and what is refused."""

import base64
import csv
import io
import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from mezo_scale import tasks
from mezo_scale.errors import ModelError, RecipeError
from mezo_scale.models import checkpoints
from mezo_scale.models.fingerprints import of_processor
from mezo_scale.recipe import TaskSection
from mezo_scale.tasks.kinds.candidates import Choice
from mezo_scale.tasks.kinds.images import accuracy_loss, class_logits, cross_entropy
from tests.support import material, pictures


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pictures.write_model(tmp_path_factory.mktemp("vit"))


def section(data: Path, **fields: Any) -> TaskSection:
    return TaskSection(**({"name": "cifar10", "data": str(data)} | fields))


def kind(folder: Path, given: TaskSection) -> Any:
    return tasks.kind_of(given, checkpoints.load_processor(str(folder)))


def rows(folder: Path, given: TaskSection) -> list[Any]:
    (examples,) = tasks.examples(given).values()
    return list(kind(folder, given).encode_all(examples))


def test_pixels_are_those_of_the_models_processor(folder: Path, tmp_path: Path) -> None:
    data = pictures.write_rows(tmp_path / "d.jsonl", pictures.row(4))
    made = kind(folder, section(data))
    batch = made.collate(rows(folder, section(data)))
    pixels = np.asarray(Image.open(io.BytesIO(pictures.png(4, 1)))).astype(np.float32)
    assert batch["pixel_values"].dtype == torch.float32
    assert torch.allclose(batch["pixel_values"][0], torch.from_numpy(pixels / 127.5 - 1).permute(2, 0, 1), atol=1e-5)
    assert batch["label"].tolist() == [1]


def test_an_image_is_bytes_or_base64_or_a_path_beside_the_data(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [pictures.png(number, number % 3) for number in range(6)]
    (tmp_path / "inner").mkdir()
    for number, data in enumerate(files):
        (tmp_path / "inner" / f"{number}.png").write_bytes(data)
    with (tmp_path / "mine.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("image", "label"), *((f"inner/{n}.png", pictures.NAMES[n % 3]) for n in range(6))])
    found = [rows(folder, section(tmp_path / "mine.csv", name="image"))]

    structs = [{"img": {"bytes": data, "path": None}, "label": n % 3} for n, data in enumerate(files)]
    datasets.Dataset.from_list(structs).to_parquet(str(tmp_path / "d.parquet"))
    found.append(rows(folder, section(tmp_path / "d.parquet")))

    found.append(rows(folder, section(pictures.write_rows(tmp_path / "d.jsonl", *map(pictures.row, range(6))))))

    hub = datasets.Dataset.from_list(structs).cast_column("img", datasets.Image())
    monkeypatch.setattr("datasets.load_dataset", lambda name, subset: {"train": hub})
    found.append(rows(folder, TaskSection(name="cifar10", data="cifar10")))
    assert all(one == found[0] for one in found)
    assert [(row.data, row.label) for row in found[0]] == [(data, n % 3) for n, data in enumerate(files)]


def test_grey_images_and_those_with_transparency_are_read_as_the_model_wants_them(folder: Path, tmp_path: Path) -> None:
    changed = []
    for number, mode in enumerate(("L", "RGBA", "P")):
        file = io.BytesIO()
        Image.open(io.BytesIO(pictures.png(number, number))).convert(mode).save(file, "PNG")
        data = base64.b64encode(file.getvalue()).decode()
        changed.append(pictures.row(number, img={"bytes": data, "path": None}))
    given = section(pictures.write_rows(tmp_path / "d.jsonl", *changed))
    assert kind(folder, given).collate(rows(folder, given))["pixel_values"].shape == (3, 3, 8, 8)


def test_the_losses_are_torchs_and_the_score_counts_classes(folder: Path, tmp_path: Path) -> None:
    given = section(pictures.write_rows(tmp_path / "d.jsonl", *map(pictures.row, range(9))), metric="macro_f1")
    made, model = kind(folder, given), pictures.build()
    encoded = rows(folder, given)
    batch = made.collate(encoded)
    with torch.no_grad():
        logits = model(pixel_values=batch["pixel_values"]).logits
        losses = torch.nn.functional.cross_entropy(logits, batch["label"], reduction="none")
        assert torch.allclose(cross_entropy(model, batch), losses)
        right = logits.argmax(1) == batch["label"]
        assert accuracy_loss(model, batch).tolist() == (1 - right.float()).tolist()
        found = made.score(made.predict(model, batch), encoded)
    assert found.metrics["accuracy"].value == pytest.approx(right.float().mean().item())
    assert found.main == "macro_f1"
    assert set(found.metrics) == {"accuracy", "macro_f1", "loss"}
    whole = made.score([Choice(row.label, 0.0) for row in encoded], encoded)
    assert (whole.metrics["macro_f1"].value, whole.metrics["accuracy"].value) == (1, 1)
    assert made.baselines(encoded, encoded)["majority"].metrics["accuracy"].value == pytest.approx(1 / 3)
    nothing = made.score([Choice(0, float("nan"))], encoded[:1])
    assert (nothing.metrics["accuracy"].value, nothing.not_finite) == (0, 1)


def test_a_model_in_16_bit_is_given_pixels_of_its_dtype(folder: Path, tmp_path: Path) -> None:
    given = section(pictures.write_rows(tmp_path / "d.jsonl", *map(pictures.row, range(2))))
    batch = kind(folder, given).collate(rows(folder, given))
    with torch.no_grad():
        assert class_logits(pictures.build().bfloat16(), batch).dtype == torch.float32


def test_rows_are_told_apart_by_file_and_label(folder: Path, tmp_path: Path) -> None:
    given = section(pictures.write_rows(tmp_path / "d.jsonl", *map(pictures.row, range(6))))
    assert len(set(map(repr, rows(folder, given)))) == 6
    assert max(len(repr(row)) for row in rows(folder, given)) < 120


def test_another_processor_has_another_fingerprint(folder: Path, tmp_path: Path) -> None:
    other = pictures.write_model(tmp_path / "other")
    same = of_processor(checkpoints.load_processor(str(other)))
    assert same == of_processor(checkpoints.load_processor(str(folder)))
    text = (other / "preprocessor_config.json").read_text().replace("0.5", "0.4")
    (other / "preprocessor_config.json").write_text(text)
    assert of_processor(checkpoints.load_processor(str(other))) != same
    assert list(same) == ["image processor"]
    assert list(of_processor(material.tokenizer())) == ["tokenizer"]


@pytest.mark.parametrize(
    ("labels", "changes", "label"),
    [
        (None, {"label": 2}, 2),
        (None, {"label": "2"}, 2),
        (None, {"label": "blue"}, 2),
        (("r", "g", "b"), {"label": "b"}, 2),
        ((10, 20, 30), {"label": 30}, 2),
    ],
)
def test_a_label_is_a_number_a_name_of_the_model_or_what_the_recipe_says(
    folder: Path, tmp_path: Path, labels: Any, changes: dict[str, Any], label: int
) -> None:
    data = pictures.write_rows(tmp_path / "d.jsonl", pictures.row(0, **changes))
    given = section(data, name="image", image_column="img", labels=labels)
    assert rows(folder, given)[0].label == label


def test_classes_whose_names_are_other_classes_numbers_are_refused(folder: Path, tmp_path: Path) -> None:
    other = shutil.copytree(folder, tmp_path / "model")
    config = json.loads((other / "config.json").read_text())
    names = ("1", "2", "3")
    config |= {"id2label": dict(enumerate(names)), "label2id": {name: n for n, name in enumerate(names)}}
    (other / "config.json").write_text(json.dumps(config))
    data = pictures.write_rows(tmp_path / "d.jsonl", pictures.row(0, label=1))
    with pytest.raises(RecipeError, match="can be labels by their names and by their numbers, and mean different ones"):
        rows(other, section(data, name="image", image_column="img"))
    given = section(data, name="image", image_column="img", labels=(0, 1, 2))
    assert rows(other, given)[0].label == 1


@pytest.mark.parametrize(
    ("fields", "changes", "said"),
    [
        ({}, {"label": 3}, "line 2 of .* has the label 3, expected one of 0, 1, 2, red, green, blue"),
        ({}, {"label": "mauve"}, "has the label 'mauve', expected one of"),
        ({}, {"label": 1.5}, "has the label '1.5', expected one of"),
        ({}, {"label": True}, "has the label True, expected a number or a name"),
        ({}, {"img": {"bytes": "?", "path": None}}, "line 2 of .* has bytes in img that are no base64"),
        ({}, {"img": {"bytes": "AAAA", "path": None}}, "line 2 of .* has no image that can be read .*cannot identify"),
        ({}, {"img": {"bytes": None, "path": None}}, "has .* in img, expected an image: a path, or a struct"),
        ({}, {"img": 3}, "has 3 in img, expected an image"),
        ({}, {"img": "gone.png"}, "names the image 'gone.png' in img, and .*gone.png can't be read .No such file"),
        ({"image_column": "img"}, {}, "task.image_column is given, but task.name is cifar10, which has no use for it"),
        ({"name": "image"}, {}, r"has no column 'image' \(did you mean 'img'\?\)"),
        (
            {"template": "{label}"},
            {},
            "task.template is given, but task.name is cifar10, whose classes are the model's",
        ),
        ({"candidates": ("a", "b")}, {}, "task.candidates is given"),
        ({"max_new_tokens": 3}, {}, "task.max_new_tokens is given"),
        ({"temperature": 1.0}, {}, "task.temperature is 1, but task.name is cifar10, which writes nothing"),
        ({"metric": "f1"}, {}, "task.metric: found 'f1'"),
        (
            {"name": "image", "image_column": "img", "labels": ("a", "b")},
            {},
            "task.labels: found a, b, expected 3 that differ, one for each class of the model: red, green, blue",
        ),
    ],
)
def test_what_is_no_image_or_no_class_is_one_line(
    folder: Path, tmp_path: Path, fields: dict[str, Any], changes: dict[str, Any], said: str
) -> None:
    data = pictures.write_rows(tmp_path / "d.jsonl", pictures.row(0), pictures.row(1, **changes))
    with pytest.raises(RecipeError, match=said) as refused:
        rows(folder, section(data, **fields))
    assert "\n" not in str(refused.value)


def test_an_image_that_was_cut_off_is_found_before_any_step(folder: Path, tmp_path: Path) -> None:
    half = base64.b64encode(pictures.png(1, 1)[:-40]).decode()
    data = pictures.write_rows(tmp_path / "d.jsonl", pictures.row(0, img={"bytes": half, "path": None}))
    with pytest.raises(RecipeError, match="line 1 of .* has no image that can be read"):
        rows(folder, section(data))


def test_images_of_several_sizes_are_refused_where_the_processor_leaves_them_so(tmp_path: Path) -> None:
    folder = pictures.write_model(tmp_path / "vit")
    text = (folder / "preprocessor_config.json").read_text().replace('"do_resize": true', '"do_resize": false')
    (folder / "preprocessor_config.json").write_text(text)
    large = base64.b64encode(pictures.png(1, 1, side=12)).decode()
    odd = pictures.row(1, img={"bytes": large, "path": None})
    data = pictures.write_rows(tmp_path / "d.jsonl", pictures.row(0), odd)
    with pytest.raises(
        RecipeError, match=r"line 2 of .* has an image of \[3, 12, 12\] .*, the ones before it \[3, 8, 8\]"
    ):
        rows(folder, section(data))


def test_one_image_under_two_labels_is_refused_and_twice_counts_once(folder: Path, tmp_path: Path) -> None:
    data = pictures.write_rows(tmp_path / "d.jsonl", pictures.row(0), pictures.row(0))
    assert len(rows(folder, section(data))) == 1
    pictures.write_rows(data, pictures.row(0), pictures.row(0, label=1))
    with pytest.raises(RecipeError, match="ask the same, but the labels 0 and 1"):
        rows(folder, section(data))


def test_a_model_without_image_processor_is_one_line(tmp_path: Path) -> None:
    folder = pictures.write_model(tmp_path / "vit")
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(ModelError, match="model.name: the image processor of .* can't be read") as refused:
        checkpoints.load_processor(str(folder))
    assert "\n" not in str(refused.value)
