// What a token says under the mouse: what was read, what comes next, its FVE and the beginning of its explanation.

const HOVER_CHARACTERS = 160, HOVER_GAP = 6;

const hideHover = () => { $("hover").hidden = true; };

const showHover = (span) => {
  const row = Number(span.dataset.i), next = nextText(row), text = E.text[R.first[row]];
  const box = $("hover"), at = span.getClientRects()[0];
  box.replaceChildren(
    make("p", {}, "read ", make("b", {}, signs(tokenText(row))), next === null ? ", the last token" : [", next ", make("b", {}, signs(next))],
      SCORED && make("span", { class: "score" }, Number.isFinite(rowFve[row]) ? `FVE ${number(rowFve[row], 2)}` : "no score")),
    text ? make("p", { class: "words" }, text.length > HOVER_CHARACTERS ? `${text.slice(0, HOVER_CHARACTERS)}\u2026` : text) : "");
  box.hidden = false;
  const { width, height } = box.getBoundingClientRect(), below = at.bottom + HOVER_GAP;
  box.style.left = `${Math.max(8, Math.min(at.left, innerWidth - width - 8))}px`;
  box.style.top = `${below + height < innerHeight ? below : Math.max(8, at.top - height - HOVER_GAP)}px`;
};

$("sequences").addEventListener("pointerover", (event) => {
  const span = event.pointerType === "touch" ? null : event.target.closest(".t");
  if (span) showHover(span); else hideHover();
});
$("sequences").addEventListener("pointerleave", hideHover);
for (const kind of ["scroll", "keydown", "pointerdown"]) addEventListener(kind, hideHover, { capture: true, passive: true });
