"""The experiments behind the claims, each in its own form and in one of seconds, with what was predicted of them."""

from __future__ import annotations

from qnext.claims.claim import Script
from qnext.claims.compute import TrainingCompute
from qnext.claims.counts import Counting
from qnext.claims.layers.beside import BesideLlama
from qnext.claims.layers.drafted import DraftedSteps
from qnext.claims.layers.shapes import RELEASED, tiny
from qnext.claims.layers.speed import DecodeSpeed, LayerSpeed, PrefillSpeed
from qnext.claims.length import LinearCost
from qnext.claims.training.ablations import RecallRuns, TextRuns
from qnext.claims.training.arms import RunBudget, recall_model, small_model
from qnext.claims.training.drafts import DraftSpeed
from qnext.claims.training.findings import Gates, HybridRatio, MoreExperts, RecallLength
from qnext.eval.ids import IdShape

_VOCAB = 512  # of problems of token ids


def _recall(length: int, num_facts: int) -> IdShape:
    return IdShape(_VOCAB, length, num_facts=num_facts, num_queries=num_facts)


_INT4 = LayerSpeed(
    RELEASED,
    "int4-g32",
    rounds=5,
    chunks=((0, 512), (4096, 512), (32768, 512), (131072, 256)),
    long_chunk=4096,
    lengths=(4096, 32768, 131072),
    batches=(1, 8),
)
_TINY = LayerSpeed(
    tiny(),
    "bf16",
    rounds=2,
    chunks=((0, 32), (64, 32)),
    long_chunk=64,
    lengths=(64, 128, 256),
    batches=(1, 2),
    step_tokens=3,
    in_this_process=True,
)
_TEXT = TextRuns(RunBudget(small_model(64), 1.0e12), seeds=3, held_out_bytes=100_000)
_RECALL = RecallRuns(
    RunBudget(recall_model(64), 1.0e12, sequence_length=64),
    seeds=3,
    task="mqar",
    shapes=(_recall(64, 4), _recall(64, 8)),
    tested=(*(_recall(64 << times, 8) for times in range(5)), *(_recall(256, pairs) for pairs in (16, 32, 64))),
)
_DRAFTS = DraftSpeed(
    RunBudget(small_model(128).with_(num_nextn_predict_layers=1), 6.0e12, sequence_length=512),
    seeds=3,
    contexts=(64, 512, 2048),
    layers=DraftedSteps(_INT4, context=4096, most_drafts=3),
)
# Steps of a few tokens: what the forms of seconds train.
_LITTLE = RunBudget(small_model(32, vocab_size=512).with_(num_experts=8), 1.0, 256, 64)
_LITTLE_TEXT = TextRuns(_LITTLE, seeds=1, train_bytes=20_000, held_out_bytes=2_000)
_LITTLE_RECALL = RecallRuns(
    RunBudget(recall_model(32), 1.0, 256, 32),
    seeds=1,
    task="mqar",
    shapes=(_recall(32, 4),),
    tested=(_recall(32, 4), _recall(64, 4), _recall(128, 4)),
    num_problems=2,
)
_LITTLE_DRAFTS = DraftSpeed(
    RunBudget(small_model(32, vocab_size=512).with_(num_experts=8, num_nextn_predict_layers=1), 1.0, 256, 64),
    seeds=1,
    contexts=(16,),
    layers=DraftedSteps(_TINY, context=64, most_drafts=1),
    answer=6,
    prompts=1,
    rounds=1,
    train_bytes=6_000,
    held_out_bytes=2_000,
)


C1 = Script(
    "C1",
    "Sizes",
    "79.67 B without and 81.3 B with MTP; 3.25 B active without the head, 3.56 B with it: 4.1 %, not 3.7 %.",
    "All the way: it is arithmetic on the published configuration.",
    short=Counting(("80b-a3b",)),
    long=Counting(("80b-a3b", "qwen3-32b", "qwen3-30b-a3b", "qwen3-235b-a22b")),
)
C2 = Script(
    "C2",
    "Training compute",
    "4.7 % of Qwen3-32B's operations (5.2 % with MTP) at 4,096 tokens, 42 to 46 % of Qwen3-30B-A3B's. The published "
    "shares then imply 0.51 to 0.58 of the hardware efficiency.",
    "The operations are exact for the published configurations and token counts. The hours are the vendor's; which "
    "lengths and which share of the peak its runs had is unknown.",
    short=TrainingCompute((4096,)),
    long=TrainingCompute((4096, 32768)),
)
C3 = Script(
    "C3",
    "Prefill beside Qwen3-32B",
    "Operations of the whole models give 9.5x at 4K, 9.8x at 32K, 10.2x at 128K. Experts lose efficiency at few rows "
    "each, so 0.7 of that is measured.",
    "Shapes, sizes and arithmetic are those of the released models, the machine is not: two processor cores without "
    "a GPU, where arithmetic bounds a prompt. A GPU of high peak loses more on small matrices of experts. Weights "
    "are random; routing is even, real routing is not.",
    short=PrefillSpeed((_TINY,)),
    long=PrefillSpeed((_INT4,), BesideLlama("int4-g32", depths=(0, 2048))),
)
C4 = Script(
    "C4",
    "Decoding beside Qwen3-32B",
    "Bytes decide: 9x to 10x for one sequence at short contexts, more than on a GPU that launches bound; with eight "
    "sequences less at 4K, since they choose different experts, and about 10x where keys and values are most of the "
    "bytes.",
    "As for C3. The published numbers are of throughput with unknown batches on GPUs. Distinct experts of a batch are "
    "those of even routing, the worst case.",
    short=DecodeSpeed((_TINY,)),
    long=DecodeSpeed((_INT4,)),
)
C5 = Script(
    "C5",
    "Three linear layers to a full one",
    "In loss the three differ by less than 2 %, linear and hybrid ahead of full attention, since convolutions give "
    "them the neighbouring tokens at once; in recall hybrid above linear where there are more pairs than a state "
    "holds.",
    "To models of 0.7 M parameters after 0.4 M tokens: five orders of magnitude below the released one. It shows who "
    "learns faster at first, not who is better in the end.",
    short=HybridRatio(_LITTLE_TEXT, _LITTLE_RECALL),
    long=HybridRatio(_TEXT, _RECALL, rates=(0.5, 2.0)),
)
C6 = Script(
    "C6",
    "Output gates of attention",
    "First-token mass below 20 % in all, and less with the gate; the largest activation smaller with the gate by "
    "less than a factor of 2.",
    "Sinks and massive activations grow with training and size: the published 46.7 % and 1,053 are of a model of 15 B "
    "parameters after 400 B tokens. A difference here has the sign, not the size.",
    short=Gates(_LITTLE_TEXT),
    long=Gates(_TEXT),
)
C7 = Script(
    "C7",
    "Number of experts and their balance",
    "Loss falls by 0.01 to 0.03 bits per byte for each doubling up to 64 experts; with 128 each has seen too few "
    "tokens. Balance over the step: a lower loss than over micro batches by less than 0.01.",
    "To 0.4 M tokens, of which an expert of 128 sees 3 %. The published gains are of 100 B tokens and more.",
    short=MoreExperts(_LITTLE_TEXT),
    long=MoreExperts(_TEXT),
)
C8 = Script(
    "C8",
    "Multi-token prediction",
    "Acceptance: arithmetic and code above prose. Speed 1.0x to 1.3x, since a draft costs a small model almost a step. "
    "In the released shape two rows of a step choose twice as many experts, so it costs 1.5x, and one draft pays from "
    "an acceptance of 0.55 on.",
    "Acceptance grows with training: published ones of large models are 0.5 to 0.9. The small model's step is bound by "
    "overhead, not by bytes; the engine stops drafting where it does not pay. Rows of random weights share no experts; "
    "those of real text share 16 to 38 % from one token to the next, so real drafts cost less.",
    short=_LITTLE_DRAFTS,
    long=_DRAFTS,
)
C9 = Script(
    "C9",
    "Cost over length",
    "A token of a linear layer costs the same within 5 % from 1K to 1M tokens, in a full layer it grows linearly. The "
    "prompt of 1,010,000 tokens takes 400 s on two cores; its memory stays within the plan.",
    "The layers are the released ones in size. The prompt is read by a model of 0.1 M parameters: its cache, its plan "
    "and its positions are what is tested, not what it understands.",
    short=LinearCost(_TINY, ((16, 32), (64, 32), (256, 16)), chunk=32, prompt=700, yarn=4.0, native=200),
    long=LinearCost(
        _INT4,
        ((1024, 512), (4096, 512), (16384, 512), (65536, 256), (262144, 128), (1048576, 64)),
        chunk=512,
        prompt=1_010_000,
        yarn=4.0,
    ),
)
C10 = Script(
    "C10",
    "Recall over length",
    "Trained on up to 64 tokens, recall holds to twice the length and falls from four times on.",
    "To generated problems of token ids (this is not RULER) and models of 0.3 M parameters that never saw such "
    "lengths. The published numbers are of lengths that the model was trained on up to 262,144 tokens.",
    short=RecallLength(_LITTLE_RECALL),
    long=RecallLength(_RECALL),
)
SCRIPTS = (C1, C2, C3, C4, C5, C6, C7, C8, C9, C10)
