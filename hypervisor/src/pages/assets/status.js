// The status page: its buttons, and states that keep up by asking.

import { call, listening, logout, run, say } from './api.js';

const base = (element) => `/api/workspaces/${element.closest('[data-workspace]').dataset.workspace}`;

const actions = {
  logout: () => logout(),
  create: async (form) => {
    await call('POST', '/api/workspaces', { name: form.elements.name.value });
    location.reload();
  },
  start: (button) => change(button, 'start'),
  stop: (button) => change(button, 'stop'),
  swap: async (button) => {
    const before = performance.now();
    say('Swapping…');
    const deployment = await call('POST', `${base(button)}/swap?wait_s=60`, {});
    if (deployment.step !== 'succeeded') throw new Error(deployment.reason ?? `The swap is ${deployment.step}.`);
    say(`Swapped in ${Math.round(performance.now() - before)} ms.`);
    await refresh();
  },
};

async function change(button, verb) {
  const { slot } = button.closest('[data-slot]').dataset;
  say(`${slot}: ${verb}…`);
  const view = await call('POST', `${base(button)}/slots/${slot}/${verb}?wait_s=60`, {});
  say(`${slot} is ${view.state}.`);
  await refresh();
}

async function refresh() {
  const { items } = await call('GET', '/api/workspaces');
  for (const workspace of items) {
    const section = document.querySelector(`[data-workspace="${workspace.name}"]`);
    for (const view of Object.values(workspace.slots)) {
      const row = section?.querySelector(`[data-slot="${view.slot}"]`);
      if (!row) continue;
      row.querySelector('[data-show=state]').textContent = view.state;
      row.querySelector('[data-show=reason]').textContent = view.reason ?? '';
    }
  }
}

document.addEventListener('click', (event) => {
  const button = event.target.closest('button[data-do]');
  if (button) run(button, () => actions[button.dataset.do](button));
});

document.addEventListener('submit', (event) => {
  event.preventDefault();
  const form = event.target;
  run(form, () => actions[form.dataset.do](form));
});

// A page in the background asks nothing.
setInterval(() => {
  if (!document.hidden) refresh().catch(() => {});
}, 3000);

listening();
