"""What the tests of own data share: captions files in three forms, folders of (empty) videos, what was prepared."""

import csv
import json

import dataset
import prepare_annotations


def captions_file(path, form, rows):
    """`rows`: name, captions, split."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if form == "csv":
        with open(path, "w", newline="", encoding="utf-8-sig") as file:
            writer = csv.writer(file)
            writer.writerow(["video", "caption", "split"])
            writer.writerows([name, text, split] for name, texts, split in rows for text in texts)
    elif form == "json":
        path.write_text(json.dumps({name: texts for name, texts, _ in rows}, ensure_ascii=False), encoding="utf-8")
    else:
        word = {"validation": "validate"}
        clips = [{"video_id": name, "split": word.get(split, split), "id": 0} for name, _, split in rows]
        said = [{"video_id": name, "caption": text, "sen_id": 0} for name, texts, _ in rows for text in texts]
        path.write_text(json.dumps({"info": {}, "videos": clips, "sentences": said}))
    return path


def prepare(data, *words):
    prepare_annotations.main(["--data", str(data), *map(str, words)])
    return dataset.Layout(data)


def ready(data, split):
    return (
        {r["id"]: r["label"] for r in dataset.read_ready(data, split)} if split in dataset.Layout(data).splits else {}
    )


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return folder


def own(tmp_path, rows, files=None, *words):
    folder = touch(tmp_path / "films", *(files if files is not None else [name for name, *_ in rows]))
    path = captions_file(tmp_path / "captions.csv", "csv", rows)
    return prepare(tmp_path / "mine", "--videos", folder, "--captions", path, *words)
