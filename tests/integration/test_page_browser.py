"""The page as a user has it, in a headless Chromium against a server with a small random network."""

import json
import math
import re
from dataclasses import replace

import pytest

from models.artifact.format import Probe
from models.artifact.load import load_artifact
from models.evaluate.perplexity import perplexity
from tests.support.api_server import live_loaded_server, live_server, wait_until
from tests.support.artifact_builder import tiny_model, write_artifact
from tests.support.browser import chromium, watched_page
from tests.support.fake_model import FakeModel, FakeParts, Faults
from tests.support.tiny_checkpoints import VOCAB_SIZE, tokenizer_files

RANK = 4
TEXT = "The river runs past the old mill, and the mill has not turned in 40 years."
SHADES = {0.5: 0, 0.2: 1, 0.05: 2, 0.01: 3, 0.001: 4}
FAILED = ("Failed to load resource",)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    directory = tmp_path_factory.mktemp("page") / "tiny-w4"
    model = tiny_model(vocab_size=VOCAB_SIZE, max_position_embeddings=256)
    write_artifact(directory, model, tokenizer_files=tokenizer_files())
    loaded = load_artifact(directory)
    token_ids = tuple(range(10, 60))
    probe = Probe(token_ids=token_ids, dense_nll=5.5, quantized_nll=perplexity(loaded.model, token_ids).nll)
    loaded = replace(loaded, manifest=loaded.manifest.model_copy(update={"probe": probe}))
    with live_loaded_server(loaded, artifact=directory, kv_cache_memory="4MiB") as live:
        yield live


@pytest.fixture(scope="module")
def browser():
    with chromium() as opened:
        yield opened


def ready(page):
    page.wait_for_selector('#state[data-state="ready"]')


def send(page, text="hello", *, waits=True):
    page.fill("#chat-input", text)
    page.press("#chat-input", "Enter")
    if waits:
        page.wait_for_selector("#chat-send", state="visible")


def set_field(page, name, value):
    """Of the sampling form, which may be folded."""
    page.evaluate("([name, value]) => { document.forms['settings-form'].elements[name].value = value; }", [name, value])


def set_rank(page, rank):
    page.locator("#rank").focus()
    page.keyboard.press("Home")
    for _ in range(rank):
        page.keyboard.press("ArrowRight")


def score(page):
    page.click("#tab-perplexity")
    page.fill("#perplexity-input", TEXT)
    page.click("#perplexity-send")
    page.wait_for_selector("#perplexity-result .token")


def perplexity_of(server, **body):
    return server.post("/v1/perplexity", json={"text": TEXT, "return_tokens": True, **body}).json()


def overflow(page):
    return page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")


def test_the_state_of_the_server_is_shown(server, browser):
    with watched_page(browser, server.url) as page:
        ready(page)
        assert page.title() == "tiny-w4 – qerve"
        assert page.inner_text("#model-name") == "tiny-w4"
        facts = dict(
            zip(page.locator("#model dt").all_inner_texts(), page.locator("#model dd").all_inner_texts(), strict=True)
        )
        assert facts["Weights"] == "INT4, groups of 32, asymmetric"
        assert facts["Rank"] == str(RANK)
        assert facts["Artifact"].startswith(server.context.info.manifest.manifest_sha256[:16])
        assert facts["Backend"].endswith("for 14 layers")
        assert page.locator("#memory h3").all_inner_texts() == ["Weights", "Key-value cache", "Process"]
        page.wait_for_selector("#tiles .figure:text-is('0')")


def test_a_chat_streams_and_its_tokens_can_be_looked_at(server, browser):
    with watched_page(browser, server.url) as page:
        ready(page)
        set_field(page, "max_tokens", "12")
        set_field(page, "system", "Be brief.")
        with page.expect_request("**/v1/chat/completions") as sent:
            send(page)
        body = json.loads(sent.value.post_data)
        assert body["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]
        assert {"stream": True, "logprobs": True, "top_logprobs": 5, "temperature": 0.7}.items() <= body.items()
        assert "rank" not in body
        stats = page.inner_text(".answer-stats")
        assert re.search(r"\d+ tokens? .* first after [\d.]+ m?s", stats), stats
        page.locator(".answer .token").first.hover()
        assert page.locator("#token-card .alternatives li").count() == 5
        shares = [float(text.rstrip(" %")) for text in page.locator("#token-card .share").all_inner_texts()]
        assert shares == sorted(shares, reverse=True)
        page.locator(".answer .tokens").focus()
        page.keyboard.press("End")
        assert page.locator(".answer .token.current").get_attribute("data-at") == str(
            page.locator(".answer .token").count() - 1
        )
        assert "instead" in page.inner_text("#announce")
        page.keyboard.press("Escape")
        assert page.locator("#token-card").is_hidden()


def test_an_answer_is_made_again_at_another_rank_and_both_stay(server, browser):
    with watched_page(browser, server.url) as page:
        ready(page)
        set_field(page, "max_tokens", "4")
        send(page)
        set_rank(page, 1)
        with page.expect_request("**/v1/chat/completions") as sent:
            page.click("text=Answer again at rank 1")
        assert json.loads(sent.value.post_data)["rank"] == 1
        page.wait_for_selector("#chat-send", state="visible")
        assert page.locator(".answer .tag").all_inner_texts() == ["rank 4 of 4", "rank 1 of 4"]


def test_what_is_stopped_ends_at_the_server_too(browser):
    parts = FakeParts(model=FakeModel(faults=Faults(step_seconds=0.1)))
    with live_server(parts) as slow, watched_page(browser, slow.url) as page:
        ready(page)
        page.click("#tab-completion")
        set_field(page, "max_tokens", "200")
        page.fill("#completion-input", "abc")
        page.click("#completion-send")
        page.wait_for_selector("#completion-output .token")
        page.click("#completion-stop")
        page.wait_for_selector("#completion-send", state="visible")
        assert page.inner_text(".answer-stats").endswith("stopped")
        wait_until(lambda: slow.metric("qerve_client_disconnects_total") == 1)
        wait_until(lambda: slow.metric("qerve_num_requests_running") == 0)


def test_a_text_is_shaded_by_how_likely_its_tokens_are(server, browser):
    with watched_page(browser, server.url) as page:
        ready(page)
        score(page)
        expected = perplexity_of(server)
        assert page.locator("#perplexity-result .figure").first.inner_text() == f"{expected['perplexity']:.2f}"
        tokens = page.locator(".heat .tokens .token")
        assert "".join(tokens.all_text_contents()) == TEXT
        shades = tokens.evaluate_all("tokens => tokens.map(token => token.dataset.shade ?? null)")
        chances = [None if token["nll"] is None else math.exp(-token["nll"]) for token in expected["tokens"]]
        by_hand = [None if chance is None else f"s{sum(chance < bound for bound in SHADES)}" for chance in chances]
        assert shades == by_hand
        assert len(set(by_hand)) > 2
        assert page.locator(".legend li").count() == len(SHADES) + 1


def test_the_slider_shows_what_the_correction_buys(server, browser):
    with watched_page(browser, server.url) as page:
        ready(page)
        score(page)
        set_rank(page, 0)
        page.wait_for_selector("text=Perplexity at rank 0")
        none, full = perplexity_of(server, rank=0)["perplexity"], perplexity_of(server)["perplexity"]
        assert none != full
        figures = page.locator("#perplexity-result .figure").all_inner_texts()
        change = 100 * (none / full - 1)
        assert figures == [f"{none:.2f}", f"{full:.2f}", f"{change:+.1f} %".replace("-", "−")]
        page.click("text=Measure the curve")
        page.wait_for_selector(".curve circle:nth-of-type(4)")  # ranks 0, 1, 2 and 4
        page.click("button:text-is('Against full rank')")
        assert page.locator('.heat .token[data-shade^="c"]').count() > 10
        page.click("#perplexity-probe")
        page.wait_for_selector("text=Dense network")
        assert f"{math.exp(5.5):.2f}" in page.inner_text("#perplexity-result")


def test_errors_are_told_where_they_happen(browser):
    with (
        live_server(api_key="secret", requests_per_minute_per_key=1) as locked,
        watched_page(browser, locked.url, FAILED) as page,
    ):
        page.wait_for_selector("#key-dialog[open]")
        page.fill("#key-input", "wrong")
        page.keyboard.press("Enter")
        send(page)
        assert "A key is needed" in page.inner_text("#chat-notice")
        page.click("text=Enter a key")
        page.fill("#key-input", "secret")
        page.keyboard.press("Enter")
        ready(page)
        assert page.evaluate("[localStorage.length, sessionStorage.length, document.cookie]") == [0, 0, ""]
        set_field(page, "max_tokens", "100000")
        send(page)
        assert "maximum context length" in page.inner_text("#chat-notice")
        set_field(page, "max_tokens", "4")
        send(page, "once more")
        assert "Too many requests" in page.inner_text("#chat-notice")
        retry = page.locator("#chat-notice button")
        assert retry.is_disabled()
        assert re.fullmatch(r"Try again in \d+ s", retry.inner_text())


def test_a_server_that_loads_or_is_gone_is_said_and_waited_for(server, browser):
    answer = json.dumps({"error": {"message": "The model is being loaded."}})
    with watched_page(browser, server.url, FAILED) as page:
        page.route("**/health/ready", lambda route: route.fulfill(status=503, body=answer))
        page.wait_for_selector('#state[data-state="loading"]')
        assert "being loaded" in page.inner_text("#banner")
        page.unroute("**/health/ready")
        page.route("**/metrics", lambda route: route.fulfill(status=404, body="{}"))
        ready(page)
        assert "elsewhere" in page.inner_text("#poll-note")
        assert page.inner_text("#model-name") == "tiny-w4"


def test_what_a_server_exports_is_shown_and_what_it_does_not_is_left_out(server, browser):
    metrics = "qerve_canary_perplexity 27.5\nqerve_canary_expected_perplexity 21\nqerve_canary_ok 0\n"
    with watched_page(browser, server.url) as page:
        page.route("**/metrics", lambda route: route.fulfill(body=metrics))
        page.wait_for_selector("text=21.0 as built")
        shown = page.inner_text("#tiles")
        assert all(words in shown for words in ("Canary perplexity", "27.5", "out of tolerance"))
        assert page.inner_text("#memory") == "The server exports nothing about its memory here."


def test_what_a_model_writes_stays_text(server, browser):
    text = "<img src=x onerror=alert(1)><script>alert(2)</script>"
    token = {
        "token": text,
        "logprob": -1.0,
        "bytes": [],
        "top_logprobs": [{"token": text, "logprob": -1.0, "bytes": []}],
    }
    choice = {"index": 0, "delta": {"content": text}, "logprobs": {"content": [token]}, "finish_reason": None}
    stream = f"data: {json.dumps({'choices': [choice]})}\n\ndata: [DONE]\n\n"
    with watched_page(browser, server.url) as page:
        ready(page)
        page.route("**/v1/chat/completions", lambda route: route.fulfill(content_type="text/event-stream", body=stream))
        send(page, text)
        page.locator(".answer .token").hover()
        assert page.inner_text(".answer .tokens") == page.inner_text("#token-card code").replace("␣", " ") == text
        assert page.locator("#chat-log img, #chat-log script, #token-card img").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_accessible_and_fits_a_phone(server, browser, scheme):
    axe = pytest.importorskip(
        "axe_playwright_python.sync_playwright", reason="axe-playwright-python is not installed"
    ).Axe()
    options = {"color_scheme": scheme, "viewport": {"width": 360, "height": 740}, "reduced_motion": "reduce"}
    with watched_page(browser, server.url, **options) as page:
        ready(page)
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(245, 247, 249)"
        assert dark == (scheme == "dark")
        set_field(page, "max_tokens", "8")
        page.evaluate("document.getElementById('settings').open = true")
        page.check("input[name=shade]")
        send(page, "a long word: " + "x" * 200)
        assert overflow(page) <= 0
        results = axe.run(page).response
        assert "color-contrast" in [item["id"] for item in results["passes"]]
        found = results["violations"]
        score(page)
        assert overflow(page) <= 0
        found += axe.run(page).response["violations"]
        page.click("#tab-completion")
        page.click("#key-open")
        assert overflow(page) <= 0
        found += axe.run(page).response["violations"]
        assert [(item["id"], [node["html"] for node in item["nodes"]]) for item in found] == []
        page.keyboard.press("Escape")
        page.check(f"input[value={'light' if scheme == 'dark' else 'dark'}]", force=True)
        assert (page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(245, 247, 249)") == dark
