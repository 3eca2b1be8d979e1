"""Run by test_training_loops.py, never imported by it: a user's script that resumes a training in a fresh process.

Usage: resume.py JOB, a JSON file with the base folder, its kind, how the adapter comes onto it, the training arguments,
the rows to train on, the checkpoint to resume from, and where to save.
"""

import json
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from randlora_torch import RandLoraConfig, get_peft_model, load_adapter

job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
torch.set_num_threads(1)
options = {"bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.bfloat16}
nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", **options)
quantization = {"quantization_config": nf4, "device_map": "cpu"} if job["kind"] == "nf4" else {}
model = AutoModelForCausalLM.from_pretrained(job["folder"], **quantization)
if job["how"] == "new":
    get_peft_model(model, RandLoraConfig(**job["config"]))
else:  # loaded to be looked at, and only then trained
    load_adapter(model, job["checkpoint"])
    model.set_adapter("default")

from transformers import Trainer, TrainingArguments  # noqa: E402, after the adapter was attached

trainer = Trainer(model, TrainingArguments(**job["arguments"]), train_dataset=job["rows"])
trainer.train(resume_from_checkpoint=job["checkpoint"])
trainer.save_model(job["out"])
