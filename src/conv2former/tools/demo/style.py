"""How the page looks, and its small scripts."""

FONTS = dict(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])  # Gradio's are on the network

# On a wide screen the results stand beside the controls, on a phone between the images and the options.
STYLE = """
.gradio-container { --quiet: color-mix(in srgb, var(--body-text-color) 78%, var(--body-background-fill)); }
.gradio-container .block {  /* Gradio's own greys are too pale to read */
  --body-text-color-subdued: var(--quiet); --block-info-text-color: var(--quiet);
  --block-label-text-color: var(--quiet); --block-title-text-color: var(--quiet);
  --checkbox-border-color: var(--quiet);
}
/* Gradio's text on it is not the name that it gives to screen readers */
#files .upload-container:not(.icon-mode) .wrap { display: none; }
#files .upload-container:not(.icon-mode)::after {
  content: "Click to upload or drop files"; color: var(--quiet); margin: auto;
}
#files a { color: inherit; }
:is(#limits, #about, #status, #answers, #examples, #code) .html-container { padding: 0; }
#code-part { margin-top: 16px; }
#layout { display: grid; gap: 16px 24px;
  grid-template: "input answers" auto "options answers" 1fr / 300px minmax(0, 1fr); }
#layout > #input { grid-area: input; }
#layout > #results { grid-area: answers; min-width: 0 !important; gap: 0; }
#layout > #options { grid-area: options; }
#layout > .column { width: auto; min-width: 0 !important; }
.gradio-container:not(:has(.has-top_k)) #top_k, .gradio-container:not(:has(.has-threshold)) #threshold,
.gradio-container:not(:has(.has-masks)) :is(#opacity, #layers),
.gradio-container:not(:has(.has-boxes)) #layers label:not(:nth-of-type(2)),
#examples:not(:has(h2)) { display: none; }
.banner { background: #b45309; color: #fff; border-radius: 8px; padding: 12px 16px; margin: 0 0 12px;
  font-size: 1.05rem; }
.banner b { color: inherit; }
.models { display: flex; flex-wrap: wrap; gap: 8px 32px; }
.models > div { flex: 1 1 340px; min-width: 0; }
.models .name { font-size: 1.5rem; font-weight: 700; margin: 0; overflow-wrap: anywhere; line-height: 1.25; }
.facts { list-style: none; margin: 2px 0 0; padding: 0; color: var(--quiet); overflow-wrap: anywhere; }
.facts li { display: inline; }
.facts li + li::before { content: " \\b7\\a0 "; }
#examples h2 { margin: 0 0 6px; font-size: .9rem; font-weight: 400; color: var(--quiet); }
.examples { display: flex; flex-wrap: wrap; gap: 6px; }
.examples button { margin: 0; padding: 0; border: 2px solid transparent; border-radius: 6px; cursor: pointer; }
.examples button:is(:hover, :focus-visible) { border-color: var(--color-accent); }
.examples img { display: block; width: 62px; height: 62px; object-fit: cover; border-radius: 4px; }
:is(.examples, .card) img { margin: 0 !important; }
#status p { margin: 0 0 10px; font-weight: 600; }
.card { border: 1px solid var(--border-color-primary); border-radius: 8px; padding: 14px 18px; margin-bottom: 16px;
  background: var(--block-background-fill); }
.card h2 { margin: 0 0 4px; font-size: 1.05rem; font-weight: 600; overflow-wrap: anywhere; }
.card h2 small, .card .note { font-weight: normal; color: var(--quiet); }
.card .agreement { margin: 0; font-weight: 600; }
.card .answers { display: grid; gap: 8px 24px; grid-template-columns: repeat(auto-fit, minmax(min(360px, 100%), 1fr)); }
.card .answer { display: grid; gap: 12px; align-content: start; padding: 8px 0; min-width: 0; }
.card .found { display: grid; gap: 10px 24px; align-items: start; }
.card .answer:only-child .found { grid-template-columns: fit-content(64%) minmax(0, 400px); }
.card h3 { margin: 0; font-size: 1rem; font-weight: 600; overflow-wrap: anywhere; }
.badge { background: #b45309; color: #fff; border-radius: 4px; padding: 1px 7px; margin-left: 8px; font-size: .8rem; }
.card h4 { margin: 0 0 6px; font-size: .85rem; color: var(--quiet); font-weight: 600; }
.card img { display: block; max-width: 100%; border-radius: 3px; }
.card img.large { max-height: 520px; }
.card .cam img { max-height: 400px; }
.card img.tiny { width: 320px; image-rendering: pixelated; }
.card .lines { list-style: none; margin: 0; padding: 0; }
.card .lines li { margin: 0 0 7px; padding: 0; }
.card .lines .row { display: flex; justify-content: space-between; gap: 10px; overflow-wrap: anywhere; }
.card :is(.share, .time) { font-variant-numeric: tabular-nums; }
.card .swatch { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .5em; }
.card .bar { height: 5px; border-radius: 3px; background: var(--border-color-primary); overflow: hidden; }
.card .bar i { display: block; height: 100%; background: #3b82c4; }
.card .files { display: flex; flex-wrap: wrap; gap: 4px 16px; margin: 10px 0 0; font-size: .85rem;
  color: var(--quiet); }
.card .files a { color: inherit; text-decoration: underline; margin: 0; padding: 0; }
.card .maps { display: grid; gap: 6px; grid-template-columns: 5.4em repeat(var(--columns), minmax(0, 1fr));
  font-size: .78rem; align-items: center; max-width: 620px; }
.card .maps img { width: 100%; }
.card .maps .head { text-align: center; color: var(--quiet); }
.card .key { margin: 8px 0 0; font-size: .85rem; color: var(--quiet); }
.card .error, .notice { color: var(--error-text-color, #b91c1c); margin: 4px 0; overflow-wrap: anywhere; }
.unseen { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
.limits { font-size: .85rem; color: var(--quiet); margin: 0; }
.hint { color: var(--quiet); padding: 16px 0; }
#code pre { overflow-x: auto; padding: 10px; margin: 0 0 8px; border-radius: 6px; font-size: .8rem;
  background: var(--background-fill-secondary); color: var(--body-text-color); }
@media (max-width: 900px) {
  #layout { grid-template: "input" "answers" "options" / minmax(0, 1fr); }
  .card { padding: 12px; }
  .hint { padding: 0; }
  .card .answer:only-child .found { grid-template-columns: minmax(0, 1fr); }
}
"""

# An example takes the place of what was uploaded, and goes the same way: the server need not know that it is one.
TAKE_EXAMPLE = """
element.addEventListener("click", async event => {
  const button = event.target.closest("button[data-name]");
  if (!button) return;
  const image = await (await fetch(button.querySelector("img").src)).blob(), files = new DataTransfer();
  files.items.add(new File([image], button.dataset.name, { type: image.type }));
  document.querySelector("#files .icon-button:not(:has(input))")?.click();  // clears
  let input = null;
  for (let tries = 0; tries < 100 && !input; tries++) {  // until Gradio has drawn it again
    await new Promise(done => setTimeout(done, 50));
    input = document.querySelector("#files input[type=file]");
  }
  if (!input) return;
  input.files = files.files;
  input.dispatchEvent(new Event("change", { bubbles: true }));
});
"""

GIVE_IMAGE = """
element.addEventListener("click", event => {
  const link = event.target.closest("a[data-image]");
  if (link) link.href = link.closest(".answer").querySelector("img").src;
});
"""

# Gradio puts a button into a button, and calls the outer one "common.upload"
MEND_UPLOAD = """
new MutationObserver(() => {
  const outer = document.querySelector("#files .icon-button:has(input):not([role])");
  if (!outer) return;
  outer.setAttribute("role", "group");
  outer.tabIndex = -1;
  outer.ariaLabel = outer.title = "Add images";
}).observe(document.body, { childList: true, subtree: true });
"""

SAY_STATUS = "element.setAttribute('role', 'status');"  # a screen reader reads what changes in it
