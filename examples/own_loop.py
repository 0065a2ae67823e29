"""Add a KV loss to a training loop of your own: two models, two tokenizers, one spec file."""

from pathlib import Path

import torch

import kava_core as kava


def train(spec_file: Path, steps: int):
    """Train the student of a spec and yield its loss at every step."""
    spec = kava.load_spec(spec_file).spec
    data = kava.make_data(spec)
    student = kava.load_student(spec.student, data.tokenizer, seed=0)
    teacher = kava.load_teachers(spec, data)["teacher"]
    sizes = {"teacher": kava.model_geometry(teacher)}
    pipeline = kava.build_pipeline(spec, teachers=sizes, student=kava.model_geometry(student))
    read_teacher = kava.Capture(teacher, layers=pipeline.teachers[0].sources, parts=pipeline.parts)
    read_student = kava.Capture(student, layers=pipeline.layers, parts=pipeline.parts)
    optimizer = torch.optim.AdamW([*student.parameters(), *pipeline.parameters()], lr=1e-3)
    for first in range(0, 8 * steps, 8):
        batch = data.collator([data.train_items[first + row] for row in range(8)])
        own, theirs = batch["student"], batch["teachers"]["teacher"]
        with torch.no_grad(), read_teacher:
            teacher(theirs["input_ids"], attention_mask=theirs["attention_mask"])
        with read_student:
            output = student(own["input_ids"], attention_mask=own["attention_mask"], labels=own["labels"])
        timelines = [kava.Timeline.from_batch(side) for side in (own, theirs)]
        own_tokens = own["attention_mask"].sum()
        terms = pipeline(read_student.take(), [read_teacher.take()], timelines[0], timelines[1:], own_tokens)
        loss = output.loss + pipeline.weighted_total(terms)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.item()


if __name__ == "__main__":
    print(*train(Path(__file__).with_suffix(".yaml"), steps=20))
