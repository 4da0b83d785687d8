// Calls to the control plane, and how a page tells what happened. It must not know any page.

export async function call(method, path, body) {
  const headers = { 'X-Choir': '1', Accept: 'application/json' };
  if (body !== undefined) headers['Content-Type'] = 'application/json';
  const answer = await fetch(path, { method, headers, body: body === undefined ? undefined : JSON.stringify(body) });
  if (answer.status === 204) return null;
  const data = await answer.json().catch(() => null);
  if (answer.ok) return data;
  const error = new Error(data?.error?.message ?? 'The server could not be reached as expected; try again.');
  error.code = data?.error?.code;
  throw error;
}

export function say(text) {
  document.getElementById('status').textContent = text;
}

// What browsers say of passkeys is for programmers.
const EXPLAINED = {
  // A person cancelled, or waited too long.
  NotAllowedError: 'The passkey prompt was cancelled or timed out; try again.',
  // One device holds one passkey of an account.
  InvalidStateError: 'This device already has a passkey for this account; sign in with it, or use another device.',
};

export function complain(error) {
  const place = document.getElementById('error');
  place.textContent = EXPLAINED[error?.name] ?? error?.message ?? String(error);
  place.hidden = false;
  say('');
}

// Runs one action at a time per element; while it runs, its buttons are off.
export async function run(element, action) {
  const buttons = element.matches('button') ? [element] : [...element.querySelectorAll('button')];
  document.getElementById('error').hidden = true;
  for (const button of buttons) button.disabled = true;
  try {
    await action();
  } catch (error) {
    complain(error);
  } finally {
    for (const button of buttons) button.disabled = false;
  }
}

function passkeys() {
  if (!globalThis.PublicKeyCredential?.parseRequestOptionsFromJSON) {
    throw new Error('This browser is too old for passkeys; update it or use another one.');
  }
  return globalThis.PublicKeyCredential;
}

export async function createPasskey(start) {
  const options = await call('POST', '/auth/register/start', start);
  const publicKey = passkeys().parseCreationOptionsFromJSON(options.publicKey);
  const credential = await navigator.credentials.create({ publicKey });
  return call('POST', '/auth/register/finish', { credential: credential.toJSON() });
}

// `path` is /auth/login or /auth/step-up.
export async function usePasskey(path) {
  const options = await call('POST', `${path}/start`, {});
  const publicKey = passkeys().parseRequestOptionsFromJSON(options.publicKey);
  const credential = await navigator.credentials.get({ publicKey });
  return call('POST', `${path}/finish`, { credential: credential.toJSON() });
}

// Does something delicate; asks for the passkey first where the server wants that.
export async function confirmed(action) {
  try {
    return await action();
  } catch (error) {
    if (error.code !== 'step_up_required') throw error;
    say('Confirm with your passkey.');
    await usePasskey('/auth/step-up');
    say('');
    return action();
  }
}

// Called when the page's script listens; until then its controls are off.
export function listening() {
  const controls = document.getElementById('controls');
  controls.disabled = false;
  if (document.activeElement === document.body) controls.querySelector('[autofocus]')?.focus();
}

export async function logout() {
  await call('POST', '/auth/logout');
  location.assign('/login');
}
