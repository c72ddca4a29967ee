"use strict";

// Connects the controls of each widget on the page to its picture.
for (const figure of document.querySelectorAll("figure.tour-widget")) {
  const data = JSON.parse(figure.querySelector("script").textContent);
  const state = Tour.initial(data);
  const picture = figure.querySelector(".tour-picture");
  const status = figure.querySelector("[role=status]");
  const inputs = [...figure.querySelectorAll("input")];

  // Screen readers hear the status when a control comes to rest, not in every frame.
  const show = (quietly = false) => {
    const width = Math.max(320, Math.min(720, picture.clientWidth));
    const found = Tour.draw(state, data, width);
    picture.innerHTML = found.svg;
    if (!quietly) status.textContent = found.status;
    for (const input of inputs) {
      const control = data.controls.find((c) => c.name === input.name);
      const text = control.texts ? control.texts[state[input.name]] : String(state[input.name]);
      input.value = state[input.name];
      input.setAttribute("aria-valuetext", text);
      input.nextElementSibling.value = text;
    }
  };

  const play = figure.querySelector("button");
  const control = data.controls.find((c) => c.step);
  let timer = null;
  const stop = () => {
    clearInterval(timer);
    timer = null;
    play.textContent = "Play";
    show();
  };

  for (const input of inputs) {
    input.addEventListener("input", () => {
      if (timer) stop();
      state[input.name] = Number(input.value);
      show();
    });
  }

  if (play) {
    play.addEventListener("click", () => {
      if (timer) return stop();
      if (state[control.name] === control.max) state[control.name] = 0;
      play.textContent = "Pause";
      timer = setInterval(() => {
        state[control.name] = Math.min(state[control.name] + 1, control.max);
        show(true);
        if (state[control.name] === control.max) stop();
      }, 60);
    });
  }

  figure.querySelector("form").hidden = false;
  let width = 0;
  const resized = () => {
    if (picture.clientWidth === width) return;
    width = picture.clientWidth;
    show(true);
  };
  window.addEventListener("resize", resized);
  resized();
}
