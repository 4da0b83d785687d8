// What the buttons and forms of the auth pages do: each element with `data-do` names its action here.

import { call, complain, confirmed, createPasskey, listening, logout, run, say, usePasskey } from './api.js';

function fields(form) {
  return Object.fromEntries(new FormData(form));
}

function showCodes(codes, onward) {
  const section = document.getElementById('codes');
  section.querySelector('ol').replaceChildren(
    ...codes.map((code) => {
      const item = document.createElement('li');
      item.textContent = code;
      return item;
    }),
  );
  section.dataset.onward = onward;
  section.hidden = false;
  section.focus();
}

function shownCodes() {
  return [...document.querySelectorAll('#codes li')].map((item) => item.textContent).join('\n') + '\n';
}

const forms = {
  async login(form) {
    say('Waiting for your passkey.');
    await usePasskey('/auth/login');
    location.assign(form.dataset.next);
  },
  async register(form) {
    say('Waiting for your passkey.');
    const done = await createPasskey({ ...fields(form), invite: form.dataset.invite });
    say('Your account is ready.');
    form.hidden = true;
    showCodes(done.recovery_codes, '/');
  },
  async recover(form) {
    const { link } = form.dataset;
    await call('POST', '/auth/recovery', link ? { link } : fields(form));
    form.hidden = true;
    const next = document.querySelector('form[data-do="new-passkey"]');
    next.hidden = false;
    next.querySelector('button').focus();
  },
  async 'new-passkey'() {
    say('Waiting for your passkey.');
    await createPasskey({});
    location.assign('/account');
  },
  async 'add-passkey'(form) {
    await confirmed(() => createPasskey(fields(form)));
    location.reload();
  },
  async 'new-token'(form) {
    const { name, scope } = fields(form);
    const made = await confirmed(() => call('POST', '/me/tokens', { name, scopes: scope.split(' ') }));
    const place = document.getElementById('token');
    place.textContent = made.token;
    place.hidden = false;
    place.focus();
    say('Copy the token now; it is shown only once.');
  },
  async device(form, button) {
    const body = { user_code: form.dataset.code };
    if (button.value === 'approve') await confirmed(() => call('POST', '/auth/device/approve', body));
    else await call('POST', '/auth/device/deny', body);
    form.hidden = true;
    say(button.value === 'approve' ? 'Allowed. You can go back to the program.' : 'Denied.');
  },
};

const buttons = {
  logout,
  async remove(button) {
    await confirmed(() => call('DELETE', button.dataset.path));
    location.reload();
  },
  async 'new-codes'() {
    const made = await confirmed(() => call('POST', '/me/recovery-codes', {}));
    showCodes(made.recovery_codes, '/account');
  },
  async 'copy-codes'() {
    await navigator.clipboard.writeText(shownCodes());
    say('Copied.');
  },
  async 'download-codes'() {
    const link = document.createElement('a');
    link.href = URL.createObjectURL(new Blob([shownCodes()], { type: 'text/plain' }));
    link.download = 'choiros-recovery-codes.txt';
    link.click();
    URL.revokeObjectURL(link.href);
  },
  async saved() {
    location.assign(document.getElementById('codes').dataset.onward);
  },
};

for (const form of document.querySelectorAll('form[data-do]')) {
  form.addEventListener('submit', (event) => {
    event.preventDefault();
    run(form, () => forms[form.dataset.do](form, event.submitter));
  });
}

for (const button of document.querySelectorAll('button[data-do]')) {
  const action = buttons[button.dataset.do];
  button.addEventListener('click', () => run(button, () => action(button)));
}

globalThis.addEventListener('unhandledrejection', (event) => complain(event.reason));

listening();
