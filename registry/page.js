// Runs in the head of MLflow's page, before MLflow's own scripts.
"use strict";

// MLflow hides stages behind a switch per browser: this turns it once, and a person may turn it back.
try {
  const key = "_mlflow_user_setting_dismiss_next_model_registry_ui";
  if (localStorage.getItem(key) === null) localStorage.setItem(key, "true");
} catch (blocked) {
  // A browser that keeps nothing shows no stages; the page works otherwise.
}

// MLflow's page asks for a comment at a transition and throws it away: this sends it along as the reason.
const plainFetch = window.fetch;
window.fetch = function (url, options) {
  const box = document.querySelector("textarea[name=comment]");
  if (box && box.value && options && String(url).includes("/model-versions/transition-stage")) {
    options = {...options, body: JSON.stringify({...JSON.parse(options.body), comment: box.value})};
  }
  return plainFetch.call(this, url, options);
};
