import pytest

from inference.errors import PromptError
from inference.openai_batch import read_request
from inference.sampling import SamplingParams

RUN = SamplingParams()
MESSAGES = [{"role": "user", "content": "hi"}]
CHAT = "/v1/chat/completions"


def test_a_chat_request_gives_messages_tools_and_parameters():
    body = {
        "model": "m",
        "messages": MESSAGES,
        "tools": [{"type": "function"}],
        "max_completion_tokens": 5,
        "temperature": 0.5,
        "stop": "x",
        "stream": False,
        "user": None,
    }
    request = read_request(CHAT, body, RUN)
    assert (request.messages, request.tools, request.prompt) == (MESSAGES, body["tools"], None)
    assert request.overrides == {"max_tokens": 5, "temperature": 0.5, "stop": "x"}


def test_a_completion_request_gives_its_prompt():
    request = read_request("/v1/completions", {"prompt": "once", "max_tokens": 2}, RUN)
    assert (request.prompt, request.messages) == ("once", None)
    assert request.overrides == {"max_tokens": 2}


def test_a_missing_url_follows_the_body():
    assert read_request(None, {"messages": MESSAGES}, RUN).messages == MESSAGES
    assert read_request(None, {"prompt": "x"}, RUN).prompt == "x"


def test_equal_limits_under_both_names_are_fine():
    body = {"messages": MESSAGES, "max_tokens": 5, "max_completion_tokens": 5}
    assert read_request(CHAT, body, RUN).overrides == {"max_tokens": 5}


def test_log_probabilities_are_taken_where_the_run_returns_them():
    body = {"messages": MESSAGES, "logprobs": True, "top_logprobs": 2}
    assert read_request(CHAT, body, SamplingParams(logprobs=2)).overrides == {}


@pytest.mark.parametrize(
    ("url", "body", "said"),
    [
        ("/v1/embeddings", {"input": "x"}, "url must be"),
        (CHAT, "text", "not an object"),
        (CHAT, None, "not an object"),
        ("/v1/completions", {"prompt": ["a", "b"]}, "one string"),
        (CHAT, {"messages": MESSAGES, "logit_bias": {"5": 1}}, "body.logit_bias"),
        (CHAT, {"messages": MESSAGES, "stream": True}, "body.stream"),
        (CHAT, {"messages": MESSAGES, "n": 2}, "body.n "),
        (CHAT, {"messages": MESSAGES, "logprobs": True}, "body.logprobs"),
        (CHAT, {"messages": MESSAGES, "prompt": "x"}, "body.prompt"),
        (CHAT, {"messages": MESSAGES, "max_tokens": 5, "max_completion_tokens": 6}, "differ"),
    ],
)
def test_what_cannot_be_honoured_is_refused_not_dropped(url, body, said):
    with pytest.raises(PromptError, match=said):
        read_request(url, body, RUN)
