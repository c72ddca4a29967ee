"use strict";

// Connects the controls of each widget on the page to its picture.
for (const figure of document.querySelectorAll("figure.tour-widget")) {
  const data = JSON.parse(figure.querySelector("script").textContent);
  const state = Tour.initial(data);
  const picture = figure.querySelector(".tour-picture");
  const status = figure.querySelector("[role=status]");
  const inputs = [...figure.querySelectorAll("input")];

  const show = () => {
    const width = Math.max(320, Math.min(720, picture.clientWidth));
    const found = Tour.draw(state, data, width);
    picture.innerHTML = found.svg;
    status.textContent = found.status;
    for (const input of inputs) {
      const control = data.controls.find((c) => c.name === input.name);
      const text = control.texts ? control.texts[state[input.name]] : String(state[input.name]);
      input.value = state[input.name];
      input.setAttribute("aria-valuetext", text);
      input.nextElementSibling.value = text;
    }
  };

  for (const input of inputs) {
    input.addEventListener("input", () => {
      state[input.name] = Number(input.value);
      show();
    });
  }

  const play = figure.querySelector("button");
  if (play) {
    const control = data.controls.find((c) => c.step);
    let timer = null;
    const stop = () => {
      clearInterval(timer);
      timer = null;
      play.textContent = "Play";
    };
    play.addEventListener("click", () => {
      if (timer) return stop();
      if (state[control.name] === control.max) state[control.name] = 0;
      play.textContent = "Pause";
      timer = setInterval(() => {
        state[control.name] += 1;
        show();
        if (state[control.name] === control.max) stop();
      }, 60);
    });
  }

  figure.querySelector("form").hidden = false;
  new ResizeObserver(show).observe(picture);
  show();
}
