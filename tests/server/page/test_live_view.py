"""The model at work, as the page shows it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from playwright.sync_api import Page, expect

from tests.server.page.acts import ask
from tests.server.page.conftest import OpenPage
from tests.server.page.mock import Script

PIXEL = """([layer, expert]) => {
  const canvas = document.getElementById("grid");
  const [x, y] = canvas.expertGrid.centreOf(layer, expert);
  return [...canvas.getContext("2d").getImageData(x, y, 1, 1).data];
}"""
# Frames that are drawn within 0.7 seconds.
FRAMES = """() => new Promise((resolve) => {
  const { prototype } = CanvasRenderingContext2D;
  const original = prototype.clearRect;
  let frames = 0;
  prototype.clearRect = function (...box) { frames += 1; return original.apply(this, box); };
  setTimeout(() => { prototype.clearRect = original; resolve(frames); }, 700);
})"""


def brightness(page: Page, layer: int, expert: int) -> int:
    return sum(page.evaluate(PIXEL, [layer, expert])[:3])


def wait_until(page: Page, is_done: Callable[[], bool]) -> None:
    """The machine may be slow: ticks and frames come when they can."""
    for _ in range(80):
        if is_done():
            return
        page.wait_for_timeout(100)
    raise AssertionError("it did not happen within 8 seconds")


@pytest.mark.parametrize(("num_layers", "num_experts"), [(8, 64), (48, 512)])
def test_the_experts_that_a_tick_names_light_up(
    open_page: OpenPage, script: Script, num_layers: int, num_experts: int
) -> None:
    script.num_layers, script.num_experts = num_layers, num_experts
    page = open_page(reduced_motion="no-preference")
    lit = {0: [3], 3: [0, num_experts - 1], num_layers - 1: [num_experts // 2]}
    dark = {layer: [5, num_experts // 3] for layer in range(num_layers)}
    script.lit = lit
    for layer, experts in lit.items():
        for expert in experts:
            wait_until(page, lambda layer=layer, expert=expert: brightness(page, layer, expert) > 350)
    for layer, experts in dark.items():
        assert all(brightness(page, layer, expert) < 250 for expert in experts), layer


def test_the_glow_fades_and_then_nothing_moves(open_page: OpenPage, script: Script) -> None:
    page = open_page(reduced_motion="no-preference")
    script.lit = {2: [7]}
    wait_until(page, lambda: brightness(page, 2, 7) > 350)
    assert page.evaluate(FRAMES) > 8, "it draws between ticks"
    script.lit = {}
    wait_until(page, lambda: brightness(page, 2, 7) < 200)
    wait_until(page, lambda: page.evaluate(FRAMES) <= 7)  # only what ticks draw, five a second


def test_without_motion_there_are_no_frames_between_ticks(open_page: OpenPage, script: Script) -> None:
    page = open_page()
    script.lit = {2: [7]}
    wait_until(page, lambda: brightness(page, 2, 7) > 350)
    assert page.evaluate(FRAMES) <= 7


def test_figures_of_a_tick_are_shown(open_page: OpenPage, script: Script) -> None:
    script.always_busy = True
    page = open_page()
    tiles = page.locator("#tiles")
    expect(tiles).to_contain_text("tokens/s")
    expect(tiles).to_contain_text("2 running")
    expect(tiles).to_contain_text("1 waiting")
    expect(tiles).to_contain_text("62 %")
    expect(tiles).to_contain_text("512 cached")
    expect(tiles).to_contain_text("5 cached · 9 free")
    expect(page.locator("#live-status")).to_contain_text("Working")
    assert float(page.locator(".stack .part.cached").first.get_attribute("width") or 0) == pytest.approx(25)
    assert page.locator(".spark-line").first.get_attribute("points")


def test_a_model_without_drafts_or_experts_has_no_such_part(open_page: OpenPage, script: Script) -> None:
    script.has_mtp, script.num_experts = False, 0
    page = open_page()
    expect(page.locator("#tiles")).to_contain_text("tokens/s")
    expect(page.locator("#tiles")).not_to_contain_text("Drafts")
    expect(page.locator(".grid-card")).to_be_hidden()
    expect(page.locator("#expert-lists")).to_be_hidden()


def test_a_model_with_experts_on_disk_tells_what_it_reads(open_page: OpenPage, script: Script) -> None:
    script.streams_experts = script.always_busy = True
    page = open_page()
    tile = page.locator(".tile", has_text="Experts in memory")
    expect(tile.locator(".tile-value")).to_have_text("71 % hits")
    expect(tile.locator(".tile-note")).to_have_text("151 MB read per token · 43 % of the time waiting")
    assert tile.locator(".spark-line").get_attribute("points")
    expect(page.locator(".tile")).to_have_count(7)
    edges = page.evaluate("[...document.querySelectorAll('.tile')].map((tile) => tile.getBoundingClientRect().right)")
    assert len({round(edges[last]) for last in (2, 4, 6)}) == 1, "every row is full"
    script.always_busy = False
    expect(tile.locator(".tile-value")).to_have_text("–")
    expect(tile.locator(".tile-note")).to_have_text("0.0 % of the time waiting")


def test_experts_that_are_all_in_memory_have_no_such_part(open_page: OpenPage, script: Script) -> None:
    """Nor does a key that sees its own requests."""
    page = open_page()
    expect(page.locator("#tiles")).to_contain_text("tokens/s")
    expect(page.locator("#tiles")).not_to_contain_text("Experts in memory")
    script.streams_experts, script.view = True, "own"
    page.reload()
    expect(page.locator("#live-title")).to_have_text("Your requests")
    expect(page.locator("#tiles")).not_to_contain_text("Experts in memory")


def test_pointing_names_an_expert_and_a_click_opens_its_layer(chat: Page) -> None:
    x, y = chat.evaluate("document.getElementById('grid').expertGrid.centreOf(3, 20)")
    chat.hover("#grid", position={"x": x, "y": y})
    expect(chat.locator("#grid-tip")).to_contain_text("Expert 20 · Layer 3 · attention")
    expect(chat.locator("#grid-tip")).to_contain_text("since start")
    chat.click("#grid", position={"x": x, "y": y})
    expect(chat.locator("#grid-caption")).to_have_text("Layer 3, 64 experts")
    chat.get_by_role("button", name="All layers").click()
    expect(chat.locator("#grid-caption")).to_have_text("8 layers × 64 experts")


def test_the_keyboard_reaches_every_expert(chat: Page) -> None:
    chat.focus("#grid")
    chat.keyboard.press("ArrowRight")
    chat.keyboard.press("ArrowDown")
    expect(chat.locator("#grid-readout")).to_contain_text("Expert 1 · Layer 1 · DeltaNet")
    chat.keyboard.press("Enter")
    expect(chat.locator("#grid-caption")).to_have_text("Layer 1, 64 experts")
    chat.keyboard.press("Escape")
    expect(chat.locator("#grid-caption")).to_have_text("8 layers × 64 experts")


def test_lists_and_table_say_it_in_words(open_page: OpenPage) -> None:
    page = open_page()
    page.locator("#expert-lists").get_by_role("button").first.click()
    expect(page.locator("#grid-caption")).to_contain_text("Layer")
    page.locator("#layer-table summary").click()
    expect(page.locator("#layer-table tbody tr")).to_have_count(8)
    expect(page.locator("#layer-table tbody tr").nth(3)).to_contain_text("attention")


def test_nobody_looks_when_the_view_is_closed(open_page: OpenPage, script: Script) -> None:
    page = open_page()
    expect(page.locator("#live-status")).to_contain_text("Idle")
    before = script.num_viewers
    page.click("#live-toggle")
    expect(page.locator("#live")).to_be_hidden()
    wait_until(page, lambda: script.num_viewers == before - 1)
    page.click("#live-toggle")
    wait_until(page, lambda: script.num_viewers == before)


def test_a_lost_stream_is_taken_up_again(open_page: OpenPage, script: Script) -> None:
    page = open_page(expected=("ERR_", "Failed to load"))
    expect(page.locator("#live-status")).to_contain_text("Idle")
    page.route("**/live/stream", lambda route: route.abort())
    page.click("#live-toggle")
    page.click("#live-toggle")
    expect(page.locator("#live-status")).to_have_text("The server cannot be reached.")
    page.unroute("**/live/stream")
    expect(page.locator("#live-status")).to_contain_text("Idle")


def test_it_lights_while_an_answer_comes(chat: Page, script: Script) -> None:
    script.pause = 0.02
    ask(chat, "markdown", wait=False)
    expect(chat.locator("#live-status")).to_contain_text("Working")
    chat.keyboard.press("Escape")


def test_a_key_that_sees_its_own_requests_is_told_so(open_page: OpenPage, script: Script) -> None:
    """No experts, no memory of everybody, no complaint; another key may see it all."""
    script.view, script.always_busy = "own", True
    page = open_page()
    expect(page.locator("#live-status")).to_have_text("Your requests only: working")
    expect(page.locator("#live-title")).to_have_text("Your requests")
    expect(page.locator("#own-note")).to_contain_text("own requests only")
    expect(page.locator("#own-requests li")).to_have_text(
        ["req-mine writes its answer · 40 tokens read, 16 of them known · 7 written"]
    )
    expect(page.locator(".tile")).to_have_count(4)
    for part in (".grid-card", "#expert-lists", "#layer-table", "#live .segments"):
        expect(page.locator(part)).to_be_hidden()
    script.always_busy = False
    expect(page.locator("#live-status")).to_have_text("Your requests only: none now")
    script.view = "all"
    page.reload()
    expect(page.locator("#live-title")).to_have_text("Experts at work")
    expect(page.locator(".tile")).to_have_count(6)
    expect(page.locator(".grid-card")).to_be_visible()
    expect(page.locator("#own-note")).to_be_hidden()


def test_alerts_of_the_watch(open_page: OpenPage, script: Script) -> None:
    """A list in words, a dot at the layer, and the drift in its tip; nothing of it where nobody watches."""
    page = open_page()
    expect(page.locator("#expert-lists")).to_contain_text("Never used")
    expect(page.locator("#expert-alerts")).to_have_count(0)
    script.alerts = {}
    expect(page.locator("#expert-alerts")).to_contain_text("None in the last 4,096 tokens")
    script.alerts = {2: ["drift"], 5: ["skew", "drift"]}
    alerts = page.locator("#expert-alerts li")
    expect(alerts).to_have_count(3)
    expect(alerts.nth(0)).to_contain_text("layer 2")
    expect(alerts.nth(0)).to_contain_text("drift 31 %, alert from 10 %")
    expect(alerts.nth(1)).to_contain_text("skew 9.2×, alert from 8.0×")
    page.locator("#layer-table summary").click()
    expect(page.locator("#layer-table tbody tr").nth(5)).to_contain_text("skew, drift")
    alerts.nth(0).locator("button").click()
    expect(page.locator("#grid-caption")).to_contain_text("Layer 2")


def test_states_and_gates_have_a_strip_for_each_layer(open_page: OpenPage, script: Script) -> None:
    """From the first step on that was looked at; a key that sees its own requests sees none."""
    page = open_page()
    states = page.locator("#states")
    expect(page.locator("#tiles")).to_contain_text("tokens/s")
    expect(states).to_be_hidden()
    script.always_busy = True
    expect(states.locator("tbody tr")).to_have_count(8)
    expect(states).to_be_visible()
    expect(states.locator("tr.attention")).to_have_count(2)
    row = states.locator("tbody tr").nth(6)
    expect(row).to_contain_text("8.0, up to 128")
    expect(row).to_contain_text("6.0 %")
    brightness = [float(cell.get_attribute("fill-opacity") or 0) for cell in row.locator(".state-head").all()]
    assert len(brightness) == 8 and brightness == sorted(brightness) and brightness[0] < 0.2
    assert float(row.locator(".gate-part").get_attribute("width") or 0) == pytest.approx(6)
    expect(states.locator("tr.attention .state-head")).to_have_count(0)
    script.view = "own"
    page.reload()
    expect(page.locator("#live-title")).to_have_text("Your requests")
    expect(states).to_be_hidden()
