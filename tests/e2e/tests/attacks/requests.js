// What a page of another site sends to a server: every way a browser has, for every route. It resolves to what the
// page could learn: `read` (an answer it could read) and `open` (a websocket that opened) must stay empty.

async (base, routes) => {
  const learnt = { sent: 0, read: [], open: [] };
  const json = { 'Content-Type': 'application/json', 'X-Choir': '1' };
  const patiently = (start) => new Promise((done) => start(done));

  async function cors(method, url) {
    const body = method === 'GET' ? undefined : '{}';
    for (const headers of [json, { 'Content-Type': 'text/plain' }]) {
      learnt.sent += 1;
      await fetch(url, { method, body, headers: body ? headers : {}, credentials: 'include' })
        .then((answer) => learnt.read.push(`${method} ${url} ${answer.status}`), () => {});
    }
  }
  async function noCors(method, url) {
    learnt.sent += 1;
    const body = method === 'GET' ? undefined : '{}';
    await fetch(url, { method, body, mode: 'no-cors', credentials: 'include' }).catch(() => {});
  }
  function form(url, enctype) {
    learnt.sent += 1;
    return patiently((done) => {
      const frame = document.createElement('iframe');
      frame.name = `f${learnt.sent}`;
      document.body.append(frame);
      const form = document.createElement('form');
      Object.assign(form, { method: 'POST', action: url, target: frame.name, enctype, hidden: true });
      const field = document.createElement('input');
      Object.assign(field, { name: '{"name":"evil","x":"', value: '"}' });
      form.append(field);
      document.body.append(form);
      frame.addEventListener('load', () => {
        frame.remove();
        form.remove();
        done();
      });
      form.submit();
    });
  }
  function image(url) {
    learnt.sent += 1;
    return patiently((done) => {
      const image = new Image();
      image.onload = image.onerror = done;
      image.src = url;
    });
  }
  function frame(url) {
    learnt.sent += 1;
    return patiently((done) => {
      const frame = document.createElement('iframe');
      frame.onload = () => {
        frame.remove();
        done();
      };
      frame.src = url;
      document.body.append(frame);
    });
  }
  function websocket(url) {
    learnt.sent += 1;
    return patiently((done) => {
      const socket = new WebSocket(url.replace('http', 'ws'));
      socket.onopen = () => {
        learnt.open.push(url);
        socket.close();
      };
      socket.onclose = done;
    });
  }

  // All at once: Chromium slows a page down that opens one failing websocket after the other.
  const attempts = routes.flatMap(({ method, path }) => {
    const url = base + path;
    const same = [cors(method, url)];
    if (method === 'GET' || method === 'POST') same.push(noCors(method, url));
    if (method === 'GET') same.push(image(url), frame(url), websocket(url));
    if (method === 'POST') {
      learnt.sent += 1;
      navigator.sendBeacon(url, '{}');
      same.push(form(url, 'text/plain'), form(url, 'application/x-www-form-urlencoded'));
    }
    return same;
  });
  await Promise.all(attempts);
  return learnt;
};
