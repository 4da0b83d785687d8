//! One tab: going somewhere, seeing values, clicking and typing as a person does. It must not know any page of ours.

use std::sync::Mutex;

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};

use crate::browser::Calls;
use crate::waiting::until;

/// What a failure is told with: a lost click shows in what has the focus and in which controls are off.
const DIAGNOSIS: &str = "(() => {
    const marks = it => [...it.attributes].filter(a => /^(id|name|data-.*)$/.test(a.name)).map(a => `[${a.name}=${a.value}]`);
    const name = it => it ? it.tagName.toLowerCase() + marks(it).join('') : 'nothing';
    const off = [...document.querySelectorAll(':disabled')].slice(0, 12).map(name).join(' ');
    const state = `${document.readyState}, ${document.hidden ? 'hidden' : 'visible'}`;
    return `${location.href} (${state})\n${document.body?.innerText}\nfocus: ${name(document.activeElement)}\ndisabled: ${off || 'nothing'}`;
})()";

/// A tab of a [`crate::browser::Browser`].
pub struct Page {
    calls: Calls,
    session: String,
    authenticator: Mutex<Option<Value>>,
}

impl Page {
    pub(crate) fn new(calls: Calls, session: String) -> Self {
        Self {
            calls,
            session,
            authenticator: Mutex::default(),
        }
    }

    /// A command of the DevTools protocol for this tab.
    pub async fn call(&self, method: &str, params: Value) -> Result<Value> {
        self.calls.call(Some(&self.session), method, params).await
    }

    /// From here on passkeys are made and used on a new device, without asking; the old one is lost.
    pub async fn new_device(&self) -> Result<()> {
        // Chromium has room for one of this kind.
        let old = self.authenticator.lock().expect("no holder of this lock panics").take();
        if let Some(old) = old {
            self.call("WebAuthn.removeVirtualAuthenticator", json!({"authenticatorId": old}))
                .await?;
        }
        let options = json!({
            "protocol": "ctap2", "transport": "internal", "hasResidentKey": true, "hasUserVerification": true,
            "isUserVerified": true, "automaticPresenceSimulation": true,
        });
        let mut added = self
            .call("WebAuthn.addVirtualAuthenticator", json!({"options": options}))
            .await?;
        *self.authenticator.lock().expect("no holder of this lock panics") = Some(added["authenticatorId"].take());
        Ok(())
    }

    /// Takes over the passkeys of another page's device as they are now, as a password manager does. Their counters
    /// go on from there, so only the one that used them last may be copied.
    pub async fn sync_passkeys(&self, from: &Self) -> Result<()> {
        let known = from
            .call("WebAuthn.getCredentials", json!({"authenticatorId": from.device()}))
            .await?;
        self.call("WebAuthn.clearCredentials", json!({"authenticatorId": self.device()}))
            .await?;
        for credential in known["credentials"].as_array().context("no passkeys")? {
            let add = json!({"authenticatorId": self.device(), "credential": credential});
            self.call("WebAuthn.addCredential", add).await?;
        }
        Ok(())
    }

    fn device(&self) -> Option<Value> {
        self.authenticator
            .lock()
            .expect("no holder of this lock panics")
            .clone()
    }

    /// Goes there by the address bar, and waits until a page has loaded, wherever redirects led.
    pub async fn goto(&self, url: &str) -> Result<()> {
        let gone = self.call("Page.navigate", json!({"url": url})).await?;
        if let Some(error) = gone["errorText"].as_str() {
            bail!("{url}: {error}");
        }
        self.wait("document.readyState === 'complete' && location.href !== 'about:blank'")
            .await?;
        Ok(())
    }

    /// The value of an expression in the page; promises are waited for.
    pub async fn eval(&self, expression: &str) -> Result<Value> {
        let asked = json!({
            "expression": expression, "awaitPromise": true, "returnByValue": true, "userGesture": true,
        });
        let mut answer = self.call("Runtime.evaluate", asked).await?;
        if let Some(thrown) = answer.get("exceptionDetails") {
            let told = &thrown["exception"]["description"];
            bail!("{expression} threw {told}");
        }
        Ok(answer["result"]["value"].take())
    }

    /// The first value of the expression that is neither false, null, zero nor empty.
    pub async fn wait(&self, expression: &str) -> Result<Value> {
        let seen = until(expression, async || {
            let value = self.eval(expression).await?;
            let nothing = [json!(null), json!(false), json!(0), json!(""), json!([])].contains(&value);
            Ok((!nothing).then_some(value))
        })
        .await;
        match seen {
            Ok(value) => Ok(value),
            Err(error) => {
                let shown = self.eval(DIAGNOSIS).await.unwrap_or_default();
                Err(error.context(format!("the page shows {}", shown.as_str().unwrap_or("nothing"))))
            }
        }
    }

    /// Waits until the element's text is this.
    pub async fn wait_text(&self, selector: &str, text: &str) -> Result<()> {
        let (selector, text) = (json!(selector), json!(text));
        self.wait(&format!(
            "document.querySelector({selector})?.textContent.trim() === {text}"
        ))
        .await?;
        Ok(())
    }

    /// Presses the left button in the middle of an element that is enabled, stays where it is, and has nothing over it.
    pub async fn click(&self, selector: &str) -> Result<()> {
        let find = json!(selector);
        let place = self
            .wait(&format!(
                "(async () => {{ const it = document.querySelector({find}); \
                 if (document.readyState !== 'complete' || !it || it.matches(':disabled')) return null; \
                 it.scrollIntoView({{block: 'center'}}); \
                 const middle = () => {{ const box = it.getBoundingClientRect(); \
                 return {{x: box.x + box.width / 2, y: box.y + box.height / 2}}; }}; \
                 const before = middle(); await new Promise(requestAnimationFrame); const {{x, y}} = middle(); \
                 return x === before.x && y === before.y && it.contains(document.elementFromPoint(x, y)) && {{x, y}}; }})()"
            ))
            .await
            .with_context(|| format!("nothing to click at {selector}"))?;
        for kind in ["mousePressed", "mouseReleased"] {
            let event = json!({"type": kind, "x": place["x"], "y": place["y"], "button": "left", "clickCount": 1});
            self.call("Input.dispatchMouseEvent", event).await?;
        }
        Ok(())
    }

    /// Types into a field, replacing what is there, until the text is in it: a key pressed while a page comes up is
    /// lost.
    pub async fn fill(&self, selector: &str, text: &str) -> Result<()> {
        let (find, wanted) = (json!(selector), json!(text));
        until(&format!("{selector} to take {text}"), async || {
            self.wait(&format!(
                "(() => {{ const it = document.querySelector({find}); it?.focus(); it?.select(); \
                 return document.activeElement === it; }})()"
            ))
            .await?;
            self.call("Input.insertText", json!({"text": text})).await?;
            let filled = self
                .eval(&format!("document.querySelector({find})?.value === {wanted}"))
                .await?;
            Ok((filled == true).then_some(()))
        })
        .await
    }

    /// The `Cookie` header's value that the browser would send there, HttpOnly ones included.
    pub async fn cookies(&self, url: &str) -> Result<String> {
        let answer = self.call("Network.getCookies", json!({"urls": [url]})).await?;
        let cookies = answer["cookies"].as_array().context("no cookies")?;
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let pairs: Vec<_> = cookies
            .iter()
            .map(|cookie| format!("{}={}", text(&cookie["name"]), text(&cookie["value"])))
            .collect();
        Ok(pairs.join("; "))
    }
}
