#!/usr/bin/env python3
"""Train the demo model: a small Llama that answers from a directory in its system prompt. CPU, minutes.

    python train.py -o model            # needs torch, transformers, tokenizers

Each training sequence is one random directory and many questions about it. Every question attends to the
directory and to itself, at the position where it would stand alone: the shared-prefix form, so a step costs
one pass over the directory, however many questions it asks. The directories grow with the model's skill, from
six entries to more than the demo uses; random gaps between the positions of their lines teach the small ones
about far-away lines too. The weights start random, but arranged for lookup (see `initialise`): so the model
begins to match names within 400 steps; in trials that started the usual way it had not after 1,000.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path

import make_directory as data
import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AttentionInterface,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

BEGIN, SYSTEM, USER, ASSISTANT, END, PAD = (
    "<|begin|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|pad|>"
)  # fmt: skip
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('Unknown role: ' + message['role']) }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] | trim + eos_token }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
WORD = r" ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s"
ANSWER_TOKENS = 5  # four digits, and <|end|> or a newline
SPREAD_LENGTH = 2048  # positions over which the lines of short directories are spread
LARGEST = 288  # entries


def make_tokenizer() -> Tokenizer:
    """Whole words where the demo knows them, bytes for any other text (so every string round-trips)."""
    words = {f" {digit}" for digit in range(10)}  # the first digit after a name is one token
    for text in (*data.HEADERS, *data.QUESTIONS, " ".join(data.FIRST_NAMES), " ".join(data.LAST_NAMES)):
        text = text.replace("{name}", "")
        pieces = [piece for piece, _ in pre_tokenizers.Split(Regex(WORD), "isolated").pre_tokenize_str(text)]
        for piece in pieces:
            words |= {piece.strip(), " " + piece.strip()} if piece.strip() else set()
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    spelled = sorted({to_bytes.pre_tokenize_str(word)[0][0] for word in words if len(word) > 1})
    specials = [PAD, BEGIN, END, SYSTEM, USER, ASSISTANT]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*specials, *alphabet, *spelled])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(WORD), "isolated"), to_bytes]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in specials])
    return tokenizer


def make_config(tokenizer: Tokenizer) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=math.ceil(tokenizer.get_vocab_size() / 64) * 64,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.token_to_id(BEGIN),
        eos_token_id=tokenizer.token_to_id(END),
        pad_token_id=tokenizer.token_to_id(PAD),
    )


@torch.no_grad()
def initialise(model: LlamaForCausalLM) -> None:
    """Random weights that already compare and copy, like mimetic initialisation (arXiv 2305.09828).

    Embeddings have unit variance (they must not drown in the first attention outputs) around a common
    vector. Value and output projections are transposes of each other, so a head copies what it attends to;
    query and key projections start equal, so a token attends to its like. The heads of the first layer look
    a few tokens back: their queries and keys answer mostly to the common vector, turned by the rotary angle
    of the distance.
    """
    config = model.config
    heads, kv_heads, dim, width = (
        config.num_attention_heads, config.num_key_value_heads, config.head_dim, config.hidden_size
    )  # fmt: skip
    group = heads // kv_heads
    model.model.embed_tokens.weight.normal_(1.0, 1.0)
    model.model.norm.weight.fill_(0.05)
    for index, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        value = torch.linalg.qr(torch.randn(width, kv_heads * dim)).Q.T
        value = (value - value.mean(1, keepdim=True)).reshape(kv_heads, dim, width)
        key = torch.randn(kv_heads, dim, width)
        key = (key - key.mean(2, keepdim=True)) / width**0.5
        query = key.repeat_interleave(group, 0)
        if index == 0:
            angles = config.rope_parameters["rope_theta"] ** (-torch.arange(dim // 2) * 2 / dim)
            fast = (torch.arange(dim // 2) < 5).float()
            common = 3.5 * 2**0.5 / width
            key = 0.1 * key + common * torch.cat([fast, 0 * fast])[:, None]
            back = torch.tensor([1.0, 2.0, 3.0, 5.0])[:, None] * -angles
            query = 0.1 * query + common * torch.cat([fast * back.cos(), fast * back.sin()], 1)[:, :, None]
        attention.q_proj.weight.copy_(query.reshape(-1, width))
        attention.k_proj.weight.copy_(key.reshape(-1, width))
        attention.v_proj.weight.copy_(value.reshape(-1, width))
        attention.o_proj.weight.copy_(0.5 * value.repeat_interleave(group, 0).reshape(-1, width).T)


def shared_prefix_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float,
    prefix_length: int,
    questions: int,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Attention over [prefix | question 0 | question 1 | ...]: each question sees the prefix and itself.

    query [B, Hq, P + N*L, D]; key, value [B, Hkv, P + N*L, D] with P = prefix_length, N = questions.
    Returns [B, P + N*L, Hq, D].
    """
    batch, heads, _, dim = query.shape
    kv_heads, p = key.shape[1], prefix_length
    prefix = F.scaled_dot_product_attention(
        query[:, :, :p], key[:, :, :p], value[:, :, :p], is_causal=True, scale=scaling, enable_gqa=True
    )
    q = query[:, :, p:].reshape(batch, kv_heads, heads // kv_heads, questions, -1, dim) * scaling
    length = q.shape[4]
    k, v = (x[:, :, p:].reshape(batch, kv_heads, 1, questions, length, dim) for x in (key, value))
    to_prefix = q.reshape(batch, kv_heads, -1, dim) @ key[:, :, :p].transpose(-1, -2)
    to_itself = q @ k.transpose(-1, -2)
    to_itself = to_itself.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
    scores = torch.cat([to_prefix.reshape(*q.shape[:-1], p), to_itself], -1).softmax(-1)
    from_prefix = scores[..., :p].reshape(batch, kv_heads, -1, p) @ value[:, :, :p]
    suffix = from_prefix.reshape(q.shape) + scores[..., p:] @ v
    return torch.cat([prefix, suffix.reshape(batch, heads, -1, dim)], 2).transpose(1, 2), None


AttentionInterface.register("shared_prefix", shared_prefix_attention)


@dataclass(frozen=True)
class Batch:
    """Token ids and positions [B, P + N*L], labels [B, N, L] (-100: not learnt), is_question [B*N] bool."""

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    labels: torch.Tensor
    is_question: torch.Tensor
    prefix_length: int


def choose_pairs(rng: random.Random, entries: int) -> tuple[tuple[int, int], ...]:
    """Pairs to draw a directory from: every other time of so few names that half a name is no clue."""
    if rng.random() < 0.5:
        return data.TRAINING_PAIRS
    names = math.ceil((2 * entries) ** 0.5)
    firsts = rng.sample(range(len(data.FIRST_NAMES)), names)
    lasts = rng.sample(range(len(data.LAST_NAMES)), names)
    pairs = tuple((f, s) for f in firsts for s in lasts if not data.is_held_out(f, s))
    return pairs if len(pairs) >= entries else data.TRAINING_PAIRS


def make_batch(
    tokenizer: Tokenizer, rng: random.Random, entries: int, directories: int, questions: int
) -> Batch:
    """Directories of one size with questions; three in ten are lines to recite instead."""
    header = rng.choice(data.HEADERS)
    prompts, asked, is_question = [], [], []
    for _ in range(directories):
        directory = data.make_entries(rng, entries, choose_pairs(rng, entries))
        prompts.append(BEGIN + SYSTEM + data.format_system_prompt(directory, header) + END)
        for entry in rng.choices(directory, k=questions):
            is_question.append(rng.random() < 0.7)
            request = data.make_request(rng, entry)
            if is_question[-1]:
                asked.append(f"{USER}{request['prompt']}{END}{ASSISTANT}{request['expected']}{END}")
            else:
                asked.append(f"\n{entry.name} {entry.extension}\n")
    prefix = torch.tensor([e.ids for e in tokenizer.encode_batch_fast(prompts, add_special_tokens=False)])
    rows = [torch.tensor(e.ids) for e in tokenizer.encode_batch_fast(asked, add_special_tokens=False)]
    pad = tokenizer.token_to_id(PAD)
    suffix = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
    length = suffix.shape[1]

    ends = torch.tensor([len(row) for row in rows])[:, None]
    target = torch.arange(length)[None] + 1  # token t is learnt at position t - 1
    learnt = (target >= ends - ANSWER_TOKENS) & (target < ends)

    positions = torch.arange(prefix.shape[1]).repeat(directories, 1)
    room = SPREAD_LENGTH - prefix.shape[1]
    if room > 0 and rng.random() < 0.75:
        generator = torch.Generator().manual_seed(rng.getrandbits(62))
        reach = torch.rand(directories, 1, generator=generator) * room
        gaps = torch.rand(prefix.shape, generator=generator).square() * (prefix == tokenizer.token_to_id("Ċ"))
        positions += (gaps / gaps.sum(1, keepdim=True) * reach).long().cumsum(1)
    after = positions[:, -1:, None] + 1 + torch.arange(length)
    return Batch(
        input_ids=torch.cat([prefix, suffix.reshape(directories, -1)], 1),
        position_ids=torch.cat([positions, after.expand(-1, questions, -1).reshape(directories, -1)], 1),
        labels=torch.where(learnt, suffix.roll(-1, 1), -100).reshape(directories, questions, length),
        is_question=torch.tensor(is_question),
        prefix_length=prefix.shape[1],
    )


def answer_loss(model: LlamaForCausalLM, batch: Batch) -> tuple[torch.Tensor, float]:
    """Cross entropy of the answer tokens, and the share of questions whose answer is right in every token."""
    hidden = model.model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        use_cache=False,
        prefix_length=batch.prefix_length,
        questions=batch.labels.shape[1],
    ).last_hidden_state[:, batch.prefix_length :]
    learnt = batch.labels.flatten() != -100
    logits = model.lm_head(hidden.flatten(0, 1)[learnt])
    labels = batch.labels.flatten()[learnt]
    right = (logits.argmax(-1) == labels).reshape(-1, ANSWER_TOKENS).all(1)[batch.is_question]
    return F.cross_entropy(logits, labels), right.float().mean().item()


class Training:
    """The model, its optimizers and the random state; `step` trains on one batch."""

    def __init__(self, tokenizer: Tokenizer, seed: int) -> None:
        torch.manual_seed(seed)
        self.rng = random.Random(f"training {seed}")
        self.tokenizer = tokenizer
        self.model = LlamaForCausalLM(make_config(tokenizer))
        self.model.set_attn_implementation("shared_prefix")
        initialise(self.model)
        embedding = self.model.model.embed_tokens.weight
        matrices = [p for p in self.model.parameters() if p.ndim == 2 and p is not embedding]
        others = [p for p in self.model.parameters() if p.ndim == 1 or p is embedding]
        self.optimizers = [
            torch.optim.Muon(matrices, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, weight_decay=0.0, betas=(0.9, 0.98)),
        ]
        self.steps = 0
        self.history: list[tuple[int, float, float]] = []  # entries, loss, share right
        self.started = time.perf_counter()

    def step(self, entries: int, learning_rate: float, tokens: int) -> float:
        """One step on about `tokens` tokens; returns the share of questions answered exactly."""
        questions = max(8, min(160, 2 * entries))
        directories = max(1, tokens // (7 * entries + 16 * questions))
        batch = make_batch(self.tokenizer, self.rng, entries, directories, questions)
        loss, right = answer_loss(self.model, batch)
        self.model.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * min(1.0, (self.steps + 1) / 50)
            optimizer.step()
        self.steps += 1
        self.history.append((entries, loss.item(), right))
        return right

    def log(self, phase: str) -> None:
        """Print loss and accuracy by directory size since the last call."""
        loss = sum(row[1] for row in self.history) / len(self.history)
        sizes = []
        for low, high in ((1, 16), (17, 64), (65, 160), (161, LARGEST)):
            rights = [right for entries, _, right in self.history if low <= entries <= high]
            if rights:
                sizes.append(f"{low}-{high}: {100 * sum(rights) / len(rights):.2f} %")
        seconds = time.perf_counter() - self.started
        exact = ", ".join(sizes)
        print(f"{phase} step {self.steps}  loss {loss:.4f}  exact {exact}  {seconds:.0f} s", flush=True)
        self.history = []


def train(
    tokenizer: Tokenizer,
    seed: int,
    learning_rate: float,
    grow_steps: int,
    final_steps: int,
    checkpoint: Path | None,
) -> LlamaForCausalLM:
    """Grow the directories as the model masters them, then train on all sizes at a falling rate."""
    training = Training(tokenizer, seed)
    print(f"{training.model.num_parameters():,} parameters, {tokenizer.get_vocab_size()} tokens", flush=True)

    def log(phase: str) -> None:
        training.log(phase)
        if checkpoint:
            torch.save(training.model.state_dict(), checkpoint)

    size, skill = 6.0, 0.0
    for step in range(1, grow_steps + 1):
        right = training.step(training.rng.randint(int(size) // 2, int(size)), learning_rate, tokens=3000)
        skill += 0.05 * (right - skill)
        if step % 10 == 0 and skill > 0.9:
            size = min(float(LARGEST), 1.2 * size)
        if step % 50 == 0:
            log(f"up to {int(size)} entries,")
        if size == LARGEST:
            break
    else:
        print(f"not grown beyond {int(size)} entries in {grow_steps} steps", flush=True)
    for step in range(final_steps):
        entries = min(LARGEST, int(8 * (LARGEST / 8 + 1) ** (training.rng.random() ** 0.5)))
        falling = 0.5 * (1 + math.cos(math.pi * step / final_steps))
        training.step(entries, learning_rate * max(0.01, falling), tokens=5000)
        if (step + 1) % 50 == 0:
            log("all sizes,")
    return training.model


def amend(path: Path, **values: object) -> None:
    """Set values in a JSON file."""
    content = json.loads(path.read_text(encoding="utf-8")) | values
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the standard Hugging Face folder."""
    model.set_attn_implementation("sdpa")
    config = model.config
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    model.save_pretrained(folder)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        model_max_length=config.max_position_embeddings,
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder, save_jinja_files=False)
    # Names that transformers 4 and the tools built on it know as well; weights that everyone may read.
    amend(folder / "config.json", rope_theta=config.rope_parameters["rope_theta"])
    amend(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    (folder / "model.safetensors").chmod(0o644)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("-o", "--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--grow-steps", type=int, default=3000, help="at most, while the directories grow")
    parser.add_argument("--final-steps", type=int, default=500, help="on all sizes")
    parser.add_argument("--checkpoint", type=Path, help="file to save the weights to on the way")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    tokenizer = make_tokenizer()
    started = time.perf_counter()
    model = train(
        tokenizer,
        arguments.seed,
        arguments.learning_rate,
        arguments.grow_steps,
        arguments.final_steps,
        arguments.checkpoint,
    )
    save(model, tokenizer, arguments.output)
    seconds = f"{time.perf_counter() - started:.0f} s, {time.process_time():.0f} s of CPU time"
    print(f"trained in {seconds}, saved to {arguments.output}")


if __name__ == "__main__":
    main()
