// Runs in the head of MLflow's page, before MLflow's own scripts. It adds; what MLflow shows stays where it is.
"use strict";

// What MLflow remembers in the browser: set once, and a person may turn each back.
const settings = {
  // Stages are hidden behind "New model registry UI".
  "_mlflow_user_setting_dismiss_next_model_registry_ui": "true",
  // A dialog recommends hiding them.
  "_mlflow_model_registry_promo_modal_dismissed_v1": "true",
  // The menu leaves out "Models" unless it is told that models are trained here.
  "mlflow.workflowType_v1": JSON.stringify("machine_learning"),
  // A chat about MLflow opens by itself over a third of the page; there is nothing behind it here.
  "mlflow.assistant.fab.autoOpenedOnFirstLoad_v1": "true",
  // Nobody's clicks are told to anybody.
  "mlflow.settings.telemetry.enabled_v1": "false",
  "mlflow.telemetry.info.alert.dismissed_v1": "true",
};
try {
  for (const [key, value] of Object.entries(settings)) {
    if (localStorage.getItem(key) === null) localStorage.setItem(key, value);
  }
} catch (blocked) {
  // A browser that keeps nothing shows no stages; the page works otherwise.
}

const style = document.createElement("style");
style.textContent = `
button[data-assistant-ui] { display: none } /* what it would ask is closed on this server */
[data-testid=note-view-outer-container] img { max-width: 100%; height: auto }
[data-testid=note-view-outer-container] :is(th, td) { padding: 2px 14px 2px 0; vertical-align: top }
[data-testid=note-view-outer-container] table + * { margin-top: 8px }
.tidegate { --ink: #16191d; --soft: #4d5560; --rule: #d5dae0; --panel: #f4f6f8;
  --good: #0b6b3a; --bad: #a81e2b; --unsure: #7a4d00; --link: #0e538b;
  margin: 8px 0 24px; max-width: 64rem; color: var(--ink); overflow-wrap: break-word }
body.dark-mode .tidegate { --ink: #e8ebef; --soft: #a9b2bd; --rule: #3a424c; --panel: #1e2329;
  --good: #5fd398; --bad: #ff8f94; --unsure: #e6b655; --link: #6cb8ee }
#tidegate-says { padding: 12px 16px; border-left: 6px solid var(--unsure); border-radius: 4px; background: var(--panel) }
#tidegate-says.live { border-color: var(--good) } #tidegate-says.no { border-color: var(--bad) }
.tidegate h2 { font-size: 18px; font-weight: 600; margin: 0 0 4px; line-height: 1.3 }
#tidegate-says.live h2, .tidegate .holds { color: var(--good) }
#tidegate-says.no h2, .tidegate :is(.broken, .refused) { color: var(--bad) }
#tidegate-says.waits h2 { color: var(--unsure) }
.tidegate p { margin: 0 0 4px } .tidegate .soft { color: var(--soft) }
.tidegate a { color: var(--link); text-decoration: underline }
.tidegate .scroll { overflow-x: auto; margin-bottom: 6px }
.tidegate table { border-collapse: collapse; width: 100% }
.tidegate :is(th, td) { text-align: left; vertical-align: top; padding: 4px 14px 4px 0;
  border-bottom: 1px solid var(--rule) }
.tidegate thead th { color: var(--soft); font-weight: 600 } .tidegate .when { white-space: nowrap }
`;
document.head.append(style);

// MLflow's page asks for a comment at a transition and throws it away: this sends it along as the reason. Whatever
// came of it, the history has a new row.
const plainFetch = window.fetch;
window.fetch = async function (url, options) {
  if (!options || !String(url).includes("/model-versions/transition-stage")) return plainFetch.call(this, url, options);
  const box = document.querySelector("textarea[name=comment]");
  if (box && box.value) {
    options = {...options, body: JSON.stringify({...JSON.parse(options.body), comment: box.value})};
  }
  try {
    return await plainFetch.call(this, url, options);
  } finally {
    ask();
  }
};

const ROWS_SHOWN = 8;
// What stands on the page: where the version stands, above MLflow's description, and the history, below it.
let pieces = [];
let wanted = "";
let turn = 0;

// Every text goes in as text: names, comments and sentences come from people.
function make(tag, text, kind) {
  const made = document.createElement(tag);
  if (kind) made.className = kind;
  if (text !== undefined) made.textContent = text;
  return made;
}

// The model and version whose page this is, or null.
function shown() {
  const found = /^#\/models\/([^/?]+)\/versions\/(\d+)/.exec(location.hash);
  return found && {model: decodeURIComponent(found[1]), version: found[2]};
}

function own(path, query) {
  const url = new URL(path, location.origin + location.pathname);
  url.search = new URLSearchParams(query || {});
  return url;
}

async function ask() {
  const page = shown();
  const asked = page ? `${page.model}/${page.version}` : "";
  const mine = ++turn; // an older answer must not take the place of a newer one
  wanted = asked;
  if (!page) return clear();
  try {
    const response = await plainFetch(own("tidegate/standing", page));
    const told = response.ok ? await response.json() : null;
    if (mine !== turn) return;
    clear();
    if (!told) return;
    pieces = [standing(told), history(told)];
    place();
  } catch (unreachable) {
    if (mine === turn) clear(); // MLflow's own page says that nothing answers
  }
}

function clear() {
  for (const piece of pieces) piece.remove();
  pieces = [];
}

function part(id, title) {
  const made = make("section", undefined, "tidegate");
  made.id = id;
  const head = make("h2", title);
  head.id = `${id}-head`;
  made.setAttribute("aria-labelledby", head.id);
  made.append(head);
  return made;
}

function standing(told) {
  const made = part("tidegate-says", told.says.head);
  made.classList.add(told.says.kind);
  const says = make("p", told.says.sentence);
  says.setAttribute("role", "status");
  made.append(says);
  for (const [name, value] of told.facts) {
    const line = make("p");
    line.append(make("span", `${name}: `, "soft"), value);
    made.append(line);
  }
  const below = make("a", "Who decided what, below");
  below.href = "#"; // MLflow keeps its own place behind the #
  below.addEventListener("click", event => {
    event.preventDefault();
    const found = document.getElementById("tidegate-history");
    if (found) found.scrollIntoView({block: "center"});
  });
  made.append(below);
  return made;
}

function history(told) {
  const made = part("tidegate-history", "Who decided what");
  made.append(told.events.length ? table(told.events.slice(0, ROWS_SHOWN)) : make("p", "Nothing yet."));
  const seal = make("p");
  const link = make("a", `The whole history of ${told.model}`);
  link.href = own("tidegate/history", {model: told.model});
  const {holds, sentence} = told.seal;
  seal.append(make("span", `${holds ? "✓" : "✗"} ${sentence}`, holds ? "holds" : "broken"), " ", link);
  made.append(seal);
  return made;
}

function table(events) {
  const made = make("table");
  const head = made.createTHead().insertRow();
  for (const name of ["when (UTC)", "who", "version", "what", "why"]) {
    head.append(Object.assign(make("th", name), {scope: "col"}));
  }
  const body = made.createTBody();
  for (const one of events) {
    const row = body.insertRow();
    row.append(make("td", one.when.replace("T", " ").replace("Z", ""), "when"), make("td", one.who));
    row.append(make("td", String(one.version)));
    const what = make("td", one.what, one.sentence ? "refused" : "");
    if (one.from) what.append(make("div", `${one.from} → ${one.to}`, "soft when"));
    const why = make("td", one.why || "no reason given");
    if (one.sentence) why.append(make("div", one.sentence, "soft"));
    row.append(what, why);
  }
  const scroll = make("div", undefined, "scroll");
  scroll.append(made);
  return scroll;
}

// Around the description. MLflow draws its page again now and then: then they are put back.
function place() {
  const box = document.querySelector("textarea[name=comment]");
  if (box && !box.placeholder) box.placeholder = "Why? Your reason is kept in the signed history.";
  if (!pieces.length || pieces.every(piece => piece.isConnected)) return;
  const tags = document.querySelector("[data-testid=tags-section]");
  let at = document.querySelector("[data-testid=note-view-outer-container]");
  if (!tags || !at) return;
  while (at.parentElement && !at.parentElement.contains(tags)) at = at.parentElement;
  at.before(pieces[0]);
  at.after(pieces[1]);
}

window.addEventListener("hashchange", ask);
document.addEventListener("DOMContentLoaded", () => {
  ask();
  let due = false;
  new MutationObserver(() => {
    const page = shown();
    if ((page ? `${page.model}/${page.version}` : "") !== wanted) ask(); // MLflow moves on without a hashchange
    if (due) return;
    due = true;
    requestAnimationFrame(() => {
      due = false;
      place();
    });
  }).observe(document.body, {childList: true, subtree: true});
});
