// What makes the console live: parts of the page that changed come as server-sent events, as HTML that the server has
// escaped, and the prompt box asks the API of the same server. No library, no build, no other address.
"use strict";

const connection = document.getElementById("connection");
const said = document.getElementById("said");

// Put new parts in place of the old ones, and read out what matters of all of them in one go.
function take(parts) {
  const news = Object.entries(parts).flatMap(([id, html]) => replace(id, html));
  if (news.length) said.textContent = news.join("; ");
}

// Put a new part in place of the old one; what was open, focused or scrolled inside stays so. Gives what is read out.
function replace(id, html) {
  const old = document.getElementById(id);
  if (!old) return [];
  const holder = document.createElement("template");
  holder.innerHTML = html;
  const fresh = holder.content.firstElementChild;
  if (!fresh) return [];
  const wasOpen = new Set([...old.querySelectorAll("details[open]")].map((one) => one.parentElement.id));
  for (const one of fresh.querySelectorAll("details")) one.open = wasOpen.has(one.parentElement.id);
  const focusable = "a, button, summary, [tabindex]";
  const focused = [...old.querySelectorAll(focusable)].indexOf(document.activeElement);
  const scrolled = [...old.querySelectorAll(".scroll")].map((one) => one.scrollLeft);
  old.replaceWith(fresh);
  fresh.querySelectorAll(".scroll").forEach((one, at) => { one.scrollLeft = scrolled[at] || 0; });
  if (focused >= 0) fresh.querySelectorAll(focusable)[focused]?.focus({ preventScroll: true });
  return newsOf(old, fresh);
}

// Only what matters is read out: another version answers, or the number of alarms has changed.
function newsOf(old, fresh) {
  const { live, count } = fresh.dataset;
  const news = [];
  if (live && live !== old.dataset.live) news.push(`${live} answers now`);
  if (count && count !== old.dataset.count) news.push(`${count} alarms stand`);
  return news;
}

function follow() {
  const events = new EventSource("/tidegate/console/events");
  events.addEventListener("open", () => { connection.textContent = "live"; });
  events.addEventListener("error", () => {
    const over = events.readyState === EventSource.CLOSED;
    connection.textContent = over
      ? "the server refuses: reload the page, or log in again"
      : "the server does not answer; trying again";
  });
  events.addEventListener("parts", (event) => { take(JSON.parse(event.data)); });
}

// The answer's place on the page: a text that grows, and a caption that says who answers.
function place(into, caption) {
  const figure = document.createElement("figure");
  const label = document.createElement("figcaption");
  const text = document.createElement("p");
  label.textContent = caption;
  text.className = "text";
  figure.append(label, text);
  figure.setAttribute("aria-busy", "true");
  into.append(figure);
  return { figure, label, text };
}

async function messageOf(reply) {
  try {
    return (await reply.json()).error.message;
  } catch {
    return `the server answered ${reply.status}`;
  }
}

// One line of a stream of chunks at a time.
async function* linesOf(reply) {
  const reader = reply.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    yield* lines;
  }
}

async function askLive(model, prompt, into) {
  const seat = place(into, `${model} is asked`);
  try {
    const reply = await fetch("/v1/chat/completions", {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify({ model, stream: true, temperature: 0, messages: [{ role: "user", content: prompt }] }),
    });
    if (!reply.ok) throw new Error(await messageOf(reply));
    for await (const line of linesOf(reply)) {
      if (!line.startsWith("data: ") || line === "data: [DONE]") continue;
      const chunk = JSON.parse(line.slice(6));
      if (chunk.error) throw new Error(chunk.error.message);
      if (chunk.tidegate) seat.label.textContent = `${chunk.tidegate.version} (live), answer ${chunk.id}`;
      seat.text.append(chunk.choices?.[0]?.delta?.content || "");
    }
  } catch (error) {
    seat.text.textContent = error.message;
    seat.text.classList.add("bad");
  } finally {
    seat.figure.setAttribute("aria-busy", "false");
  }
}

// The whole answers of both versions, once both are there.
async function askBoth(stream, prompt, into) {
  const beside = document.createElement("div");
  beside.className = "sides";
  into.append(beside);
  const seats = [place(beside, "live is asked"), place(beside, "the candidate is asked")];
  const show = (seat, side, role) => {
    seat.label.textContent = `${side.version} (${role})`;
    seat.text.textContent = side.error ?? side.text;
    seat.text.classList.toggle("bad", side.error !== null);
  };
  try {
    const reply = await fetch("/tidegate/compare", {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify({ stream, messages: [{ role: "user", content: prompt }] }),
    });
    if (!reply.ok) throw new Error(await messageOf(reply));
    const found = await reply.json();
    show(seats[0], found.live, "live");
    show(seats[1], found.candidate, found.same ? "candidate, the same answer" : "candidate");
  } catch (error) {
    beside.replaceChildren();
    const seat = place(beside, "not answered");
    seat.text.textContent = error.message;
    seat.text.classList.add("bad");
  } finally {
    for (const one of beside.children) one.setAttribute("aria-busy", "false");
  }
}

const form = document.getElementById("ask");

async function ask(how) {
  if (!form.reportValidity()) return;
  const buttons = form.querySelectorAll("button");
  const into = document.getElementById("answers");
  for (const one of buttons) one.disabled = true;
  into.replaceChildren();
  await how(form.model.value, form.prompt.value, into);
  for (const one of buttons) one.disabled = false;
}

form.addEventListener("submit", (event) => {
  event.preventDefault();
  ask(askLive);
});
document.getElementById("both")?.addEventListener("click", () => ask(askBoth));
form.prompt.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
});
follow();
