"""A mistake in options, model or data is refused where it is made, and nothing is lost at the end."""

from __future__ import annotations

import json

import torch

from benchmarks.silent_failures.case import REFUSAL, Outcome, case
from benchmarks.silent_failures.cases.adapters import lora
from benchmarks.silent_failures.cases.lengths import TEXTS
from benchmarks.silent_failures.libraries import Library
from benchmarks.silent_failures.tiny import CHATML, make_config, make_model, make_tokenizer

ROWS = [{"text": text} for text in TEXTS]
CHAT = [{"role": "user", "content": "What is the capital of France?"}, {"role": "assistant", "content": "Paris."}]


@case(
    "Tokens in a cache, made with another chat template",
    threads=("axolotl-ai-cloud/axolotl#1265", "huggingface/trl#1299"),
    says=r"\bcached?\b",
)
def stale_cache(library: Library) -> Outcome:
    path = library.folder() / "rows.jsonl"
    path.write_text(json.dumps({"messages": CHAT}) + "\n")
    rows, texts = library.read(path), []
    for template in (CHATML, CHATML.replace("message['role']", "message['role'] | upper")):
        tokenizer = make_tokenizer(template)
        texts.append(library.texts(library.trainer(make_model(), tokenizer, rows), tokenizer)[0])
    return Outcome(["<|im_start|>ASSISTANT" in text for text in texts], [False, True])


@case("A misspelt option is ignored", says=r"lerning_rate")
def misspelt_option(library: Library) -> Outcome:
    library.config(lerning_rate=1e-3)
    return Outcome("accepted", REFUSAL)


@case(
    "A misspelt key of `dataset_kwargs` is ignored",
    says=r"skip_prepare_datasets|dataset_kwargs",
)
def misspelt_dataset_option(library: Library) -> Outcome:
    library.trainer(make_model(), make_tokenizer(), ROWS, dataset_kwargs={"skip_prepare_datasets": True})
    return Outcome("accepted", REFUSAL)


@case(
    "`completion_only_loss` is ignored on plain text",
    threads=("huggingface/trl#1507", "huggingface/trl#5324"),
    says=r"completion_only_loss",
)
def completion_only_on_text(library: Library) -> Outcome:
    tokenizer = make_tokenizer()
    trainer = library.trainer(make_model(), tokenizer, ROWS[:1], completion_only_loss=True)
    return Outcome(library.spans(trainer, tokenizer)[0], REFUSAL)


@case(
    "`completion_only_loss` is ignored on conversations",
    threads=("huggingface/trl#1282",),
    says=r"completion_only_loss",
)
def completion_only_on_chats(library: Library) -> Outcome:
    tokenizer = make_tokenizer()
    trainer = library.trainer(make_model(), tokenizer, [{"messages": CHAT}], completion_only_loss=True)
    return Outcome(library.spans(trainer, tokenizer)[0], REFUSAL)


@case(
    "A `formatting_func` that returns a list of texts (as trl's document of 2025 had it)",
    threads=("huggingface/trl#3141", "unslothai/unsloth#603"),
    says=r"formatting_func|formatting function",
)
def formatting_func_of_batches(library: Library) -> Outcome:
    tokenizer = make_tokenizer()
    rows = [{"question": "One?", "answer": "Two."}, {"question": "Three?", "answer": "Four."}]

    def format_batch(batch: dict) -> list[str]:
        return [f"{batch['question'][i]} {batch['answer'][i]}" for i in range(len(batch["question"]))]

    trainer = library.trainer(make_model(), tokenizer, rows, formatting_func=format_batch)
    return Outcome(library.texts(trainer, tokenizer), ["One? Two.<|im_end|>", "Three? Four.<|im_end|>"])


@case(
    "A row without a completion among rows that have one",
    says=r"\brow \d+.*completion",
)
def completion_is_null(library: Library) -> Outcome:
    tokenizer = make_tokenizer()
    rows = [{"prompt": "Hi ", "completion": "Hello"}, {"prompt": CHAT[0]["content"], "completion": None}]
    trainer = library.trainer(make_model(), tokenizer, rows)
    return Outcome(library.texts(trainer, tokenizer), REFUSAL)


@case(
    "A model for classification is trained",
    threads=("huggingface/trl#433", "huggingface/trl#564"),
    says=r"causal|ForSequenceClassification|score\.weight",
)
def classification_head(library: Library) -> Outcome:
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(make_config("llama"))
    return Outcome(library.first_loss(library.trainer(model, make_tokenizer(), ROWS, max_steps=1)) > 0, REFUSAL)


@case(
    "A masked language model (BERT) is trained on the next token",
    threads=("huggingface/trl#564",),
    says=r"causal|MaskedLM|masked language",
)
def masked_language_model(library: Library) -> Outcome:
    from transformers import AutoModelForMaskedLM

    torch.manual_seed(0)
    model = AutoModelForMaskedLM.from_config(make_config("bert"))
    return Outcome(library.first_loss(library.trainer(model, make_tokenizer(), ROWS, max_steps=1)) > 0, REFUSAL)


@case(
    "An encoder-decoder (T5) is trained",
    threads=("huggingface/trl#6198",),
    says=r"causal|encoder[- ]decoder|Seq2Seq|ConditionalGeneration",
)
def encoder_decoder(library: Library) -> Outcome:
    from transformers import AutoModelForSeq2SeqLM

    torch.manual_seed(0)
    config = make_config("t5", d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, decoder_start_token_id=0)
    model = AutoModelForSeq2SeqLM.from_config(config)
    return Outcome(library.first_loss(library.trainer(model, make_tokenizer(), ROWS, max_steps=1)) > 0, REFUSAL)


@case(
    "A generation config that can't be saved costs the whole training",
    threads=("huggingface/transformers#29988", "QwenLM/Qwen3-ASR#210"),
    says=r"generation[_ ]?config|temperature|do_sample",
)
def generation_config_refused_at_save(library: Library) -> Outcome:
    model = make_model()
    model.generation_config.do_sample = False
    model.generation_config.temperature = 0.6
    trainer = library.trainer(model, make_tokenizer(), ROWS, max_steps=1)
    library.train(trainer)
    return Outcome((library.save(trainer) / "model.safetensors").exists(), True)


@case(
    "A tokenizer that can't be saved costs the whole training",
    says=r"tokenizer|serializ",
)
def tokenizer_refused_at_save(library: Library) -> Outcome:
    from tokenizers.pre_tokenizers import PreTokenizer

    class Whole:
        def pre_tokenize(self, text: object) -> None:
            pass

    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = PreTokenizer.custom(Whole())
    trainer = library.trainer(make_model(), tokenizer, ROWS, max_steps=1)
    library.train(trainer)
    return Outcome((library.save(trainer) / "tokenizer.json").exists(), True)


@case(
    "The last checkpoint is shipped instead of the best",
    threads=("ml-explore/mlx-lm#331", "modelscope/ms-swift#7909", "hiyouga/LLaMA-Factory#4443"),
    says=r"best",
    quick=False,
)
def last_instead_of_best(library: Library) -> Outcome:
    options = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "eval_strategy": "steps"}
    options |= {"eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 4, "learning_rate": 0.5}
    trainer = library.trainer(make_model(), make_tokenizer(), ROWS, eval_rows=ROWS, **options)
    losses = [line["eval_loss"] for line in library.train(trainer) if "eval_loss" in line]
    return Outcome(library.eval_loss(trainer), min(losses))


@case(
    "Batched answers differ from single ones: convolutions (LFM2)",
    threads=("huggingface/transformers#41790", "huggingface/transformers#46773"),
    says=r"cache|padding",
)
def batched_answers_of_lfm2(library: Library) -> Outcome:
    return batched_answers(library, "lfm2")


@case(
    "Batched answers differ from single ones: linear attention (Qwen3-Next)",
    threads=("huggingface/transformers#41790",),
    says=r"cache|padding",
)
def batched_answers_of_qwen3_next(library: Library) -> Outcome:
    return batched_answers(library, "qwen3_next")


@case(
    "Batched answers differ from single ones: state space (Mamba)",
    threads=("huggingface/transformers#41790",),
    says=r"cache|padding",
)
def batched_answers_of_mamba(library: Library) -> Outcome:
    return batched_answers(library, "mamba")


def batched_answers(library: Library, family: str) -> Outcome:
    """Compare greedy answers to a batch of prompts with those to each prompt, computed without a cache."""
    model, tokenizer = make_model(family), make_tokenizer()
    prompts = [tokenizer(text)["input_ids"] for text in ("The quick brown fox", "Paris", "0 1 2 3 4 5 6 7 8 9")]
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    right = []
    for prompt in prompts:
        ids = list(prompt)
        for _ in range(6):
            with torch.no_grad():
                ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
            if ids[-1] == tokenizer.eos_token_id:
                break
        right.append(tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True))
    return Outcome(library.answers(model, tokenizer, prompts, 6), right)


@case(
    "A right answer that holds special tokens scores 0",
    threads=("PrimeIntellect-ai/prime-rl#885",),
    says=r"special tokens?",
)
def scores_with_special_tokens(library: Library) -> Outcome:
    return Outcome(
        library.score_of_reference(make_model(), make_tokenizer(), "<|tool_call_start|>look()<|tool_call_end|>"), 1.0
    )


@case("A key that stands twice in one JSON object of a row", threads=("huggingface/trl#5307",), says=r"twice|duplicate")
def key_twice_in_json(library: Library) -> Outcome:
    path = library.folder() / "rows.jsonl"
    path.write_text('{"text": "The quick fox.", "text": "Paris."}\n')
    return Outcome([row["text"] for row in library.read_file(path)], REFUSAL)


@case(
    "Arguments for loading a model that is loaded already are ignored",
    says=r"model_init_kwargs",
)
def ignored_model_arguments(library: Library) -> Outcome:
    options = {"model_init_kwargs": {"attn_implementation": "eager"}, "peft_config": lora()}
    library.trainer(make_model(), make_tokenizer(), ROWS, **options)
    return Outcome("accepted", REFUSAL)
