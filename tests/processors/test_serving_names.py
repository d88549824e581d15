"""Processors under the names of serving engines, each against a loop over rows."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastlogits import (
    AllowedTokensLogitsProcessor,
    FrequencyPenaltyLogitsProcessor,
    LogitBiasLogitsProcessor,
    LogitsProcessorList,
    MinTokensLogitsProcessor,
    PresencePenaltyLogitsProcessor,
    TokenMask,
)
from tests.models import VOCAB_SIZE
from tests.processors.toy import DEVICE, DTYPES, EOS, INF, V, few, same


@few
@given(data=st.data())
def test_against_a_loop(data):
    draw = data.draw
    rows, length, dtype = draw(st.integers(1, 4)), draw(st.integers(1, 12)), draw(st.sampled_from(DTYPES))
    prompt_length = draw(st.integers(0, length))
    torch.manual_seed(draw(st.integers(0, 10**6)))
    ids = torch.randint(0, V, (rows, length), dtype=draw(st.sampled_from([torch.int32, torch.int64])), device=DEVICE)
    scores = torch.randn(rows, 3 * V, device=DEVICE)[:, V : 2 * V].to(dtype)
    penalty, minimum = draw(st.sampled_from([-1.5, 0.0, 0.7])), draw(st.integers(0, 6))
    bias = draw(st.dictionaries(st.integers(0, V - 1), st.sampled_from([-100.0, -INF, 0.3]), max_size=4))
    tokens = draw(st.sets(st.integers(0, V - 1), min_size=1, max_size=4))

    def presence(row, generated):
        for token in set(generated):
            row[token] -= penalty

    def frequency(row, generated):
        for token in set(generated):
            row[token] -= penalty * generated.count(token)

    def biased(row, generated):
        for token, value in bias.items():
            row[token] += value

    def allowed(row, generated):
        for token in set(range(V)) - tokens:
            row[token] = -INF

    def unending(row, generated):
        for token in tokens if len(generated) < minimum else ():
            row[token] = -INF

    text_bias = {str(token): value for token, value in bias.items()}
    cases = [
        (PresencePenaltyLogitsProcessor(penalty), presence),
        (FrequencyPenaltyLogitsProcessor(penalty), frequency),
        (LogitBiasLogitsProcessor(bias), biased),
        (LogitBiasLogitsProcessor(text_bias), biased),
        (AllowedTokensLogitsProcessor(tokens), allowed),
        (AllowedTokensLogitsProcessor(TokenMask.from_ids(tokens, V)), allowed),
        (MinTokensLogitsProcessor(minimum, tokens), unending),
    ]
    before = scores.clone()
    for processor, rule in cases:
        processed = processor.for_run(prompt_length)(ids, scores)
        assert same(scores, before)
        near = {"rtol": 1e-6} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 1e-2}
        for row in range(rows):
            expected = scores[row].clone()
            rule(expected, ids[row, prompt_length:].tolist())
            # A count times a penalty is rounded once or twice.
            assert torch.allclose(processed[row].cpu(), expected.cpu(), **near)
            alone = processor.for_run(prompt_length)(ids[row : row + 1], scores[row : row + 1])
            assert same(alone[0], processed[row])
        order = torch.randint(0, rows, (rows + 1,), device=DEVICE)
        assert same(processor.for_run(prompt_length)(ids[order], scores[order]), processed[order])


def test_in_generate(llama):
    processors = LogitsProcessorList(
        [
            PresencePenaltyLogitsProcessor(0.5),
            FrequencyPenaltyLogitsProcessor(0.25),
            LogitBiasLogitsProcessor({5: 2.0, 7: -INF}),
            AllowedTokensLogitsProcessor(range(2, 40)),
            MinTokensLogitsProcessor(4, [EOS, 9]),
        ]
    )
    prompt = torch.tensor([[1, 5, 6, 7], [1, 9, 9, 3]])
    result = llama.generate(
        prompt, logits_processor=processors, max_new_tokens=8, do_sample=False, output_logits=True,
        output_scores=True, return_dict_in_generate=True,
    )  # fmt: skip
    for step, (logits, scores) in enumerate(zip(result.logits, result.scores, strict=True)):
        for row in range(2):
            expected = logits[row].clone()
            generated = result.sequences[row, 4 : 4 + step].tolist()
            for token in set(generated):
                expected[token] -= 0.5
                expected[token] -= 0.25 * generated.count(token)
            expected[5] += 2.0
            banned = [7, 0, 1, *range(40, VOCAB_SIZE), *([EOS, 9] if step < 4 else [])]
            expected[banned] = -INF
            assert torch.allclose(scores[row], expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PresencePenaltyLogitsProcessor(INF), "penalty"),
        (lambda: FrequencyPenaltyLogitsProcessor("1"), "penalty"),
        (lambda: LogitBiasLogitsProcessor([1]), "logit_bias"),
        (lambda: LogitBiasLogitsProcessor({-1: 1.0}), "logit_bias"),
        (lambda: LogitBiasLogitsProcessor({1: INF}), "logit_bias"),
        (lambda: LogitBiasLogitsProcessor({1.5: 1.0}), "logit_bias"),
        (lambda: AllowedTokensLogitsProcessor([]), "allowed_token_ids"),
        (lambda: AllowedTokensLogitsProcessor([-3]), "allowed_token_ids"),
        (lambda: MinTokensLogitsProcessor(-1, [1]), "min_tokens"),
        (lambda: MinTokensLogitsProcessor(1, [1.5]), "stop_token_ids"),
        (lambda: LogitBiasLogitsProcessor({99: 1.0})(None, torch.zeros(1, V)), "99"),
        (lambda: AllowedTokensLogitsProcessor([99])(None, torch.zeros(1, V)), "allowed_token_ids.*99"),
        (lambda: PresencePenaltyLogitsProcessor(1.0)(torch.ones(1, 1).int(), torch.zeros(1, V)), "run starts"),
        (lambda: MinTokensLogitsProcessor(1, [1])(torch.ones(1, 1).int(), torch.zeros(1, V)), "run starts"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message):
        make()
