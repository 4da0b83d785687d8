//! Websockets to the hypervisor and, through it, to sandboxes. It must not know what the frames mean.

use std::sync::Arc;

use bytes::Bytes;
use futures_util::{SinkExt as _, StreamExt as _};
use reqwest::Method;
use reqwest::header::HeaderMap;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;
use tokio_tungstenite::tungstenite::{Error, Message};
use url::Url;

use super::dial::{self, Stream};
use super::{Client, ClientError, refusal};

/// A frame that means something to us.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frame {
    Text(String),
    Binary(Bytes),
    /// The other side closed, with its code: 1000 is in order, 1012 asks to come back.
    Closed(u16),
}

/// An open websocket.
pub struct Socket {
    inner: WebSocketStream<Box<dyn Stream>>,
}

impl Client {
    /// Opens a websocket at a path of the control host.
    pub(crate) async fn socket(&self, path: &str) -> Result<Socket, ClientError> {
        let url = self.base.join(path).map_err(|_| ClientError::Path)?;
        // The rule for mutations is the rule for websockets: a browser sends its cookie with either.
        Socket::open(&url, self.identity(&Method::POST)?, &self.tls).await
    }

    /// Opens a websocket at any URL, such as a sandbox's host, with exactly these headers.
    ///
    /// # Errors
    /// As for every call; a server that does not upgrade gives its own error.
    pub async fn socket_at(&self, url: &Url, headers: HeaderMap) -> Result<Socket, ClientError> {
        Socket::open(url, headers, &self.tls).await
    }
}

impl Socket {
    async fn open(url: &Url, headers: HeaderMap, tls: &Arc<rustls::ClientConfig>) -> Result<Self, ClientError> {
        let stream = dial::connect(url, tls).await?;
        let mut target = url.clone();
        let scheme = if url.scheme() == "https" { "wss" } else { "ws" };
        target.set_scheme(scheme).map_err(|()| ClientError::Path)?;
        let mut request = target.as_str().into_client_request().map_err(|_| ClientError::Path)?;
        request.headers_mut().extend(headers);
        match tokio_tungstenite::client_async(request, stream).await {
            Ok((inner, _)) => Ok(Self { inner }),
            Err(Error::Http(answer)) => {
                let body = answer.body().as_deref().unwrap_or_default();
                Err(refusal(answer.status(), body))
            }
            Err(error) => Err(broken(url, &error)),
        }
    }

    /// # Errors
    /// [`ClientError::Unreachable`] where the connection is gone.
    pub async fn send_text(&mut self, text: String) -> Result<(), ClientError> {
        self.send(Message::text(text)).await
    }

    /// # Errors
    /// [`ClientError::Unreachable`] where the connection is gone.
    pub async fn send_binary(&mut self, bytes: Bytes) -> Result<(), ClientError> {
        self.send(Message::Binary(bytes)).await
    }

    async fn send(&mut self, message: Message) -> Result<(), ClientError> {
        self.inner.send(message).await.map_err(|e| lost(&e))
    }

    /// The next frame; a connection that ends without saying so counts as closed with 1006. May be dropped
    /// half-way without losing a frame.
    ///
    /// # Errors
    /// [`ClientError::Unreachable`] where the connection broke the protocol.
    pub async fn next(&mut self) -> Result<Frame, ClientError> {
        loop {
            match self.inner.next().await {
                Some(Ok(Message::Text(text))) => return Ok(Frame::Text(text.as_str().to_owned())),
                Some(Ok(Message::Binary(bytes))) => return Ok(Frame::Binary(bytes)),
                Some(Ok(Message::Close(frame))) => {
                    return Ok(Frame::Closed(frame.map_or(1005, |f| u16::from(f.code))));
                }
                Some(Ok(Message::Ping(_) | Message::Pong(_) | Message::Frame(_))) => {}
                Some(Err(Error::ConnectionClosed | Error::AlreadyClosed | Error::Io(_) | Error::Protocol(_)))
                | None => {
                    return Ok(Frame::Closed(1006));
                }
                Some(Err(error)) => return Err(lost(&error)),
            }
        }
    }

    /// Says goodbye; what comes in after it is not read.
    pub async fn close(mut self) {
        // A peer that is already gone needs no goodbye.
        let _gone = self.inner.close(None).await;
    }
}

fn broken(url: &Url, error: &Error) -> ClientError {
    ClientError::Unreachable {
        url: url.origin().ascii_serialization(),
        reason: error.to_string(),
    }
}

fn lost(error: &Error) -> ClientError {
    ClientError::Unreachable {
        url: "the websocket".to_owned(),
        reason: error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt as _;
    use tokio::net::TcpListener;
    use tokio_tungstenite::tungstenite::protocol::CloseFrame;

    use super::*;
    use crate::client::Credential;

    async fn listen() -> (TcpListener, Client) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let base = format!("http://live--a--b.localhost:{}", listener.local_addr().unwrap().port());
        (
            listener,
            Client::new(&base, Credential::Token("choir_x".into())).unwrap(),
        )
    }

    #[tokio::test]
    async fn frames_come_back_as_they_were_sent_and_a_close_has_its_code() {
        let (listener, client) = listen().await;
        let server = async {
            let (stream, _) = listener.accept().await.unwrap();
            let mut peer = tokio_tungstenite::accept_async(stream).await.unwrap();
            peer.send(Message::Ping(Bytes::new())).await.unwrap();
            let mut echoed = 0;
            while echoed < 2 {
                let message = peer.next().await.unwrap().unwrap();
                if !message.is_pong() {
                    peer.send(message).await.unwrap();
                    echoed += 1;
                }
            }
            let frame = CloseFrame {
                code: 1012.into(),
                reason: "".into(),
            };
            peer.close(Some(frame)).await.unwrap();
        };
        let ours = async {
            let mut socket = client.socket("/x").await.unwrap();
            socket.send_text("a".into()).await.unwrap();
            socket.send_binary(Bytes::from_static(b"\xff")).await.unwrap();
            [
                socket.next().await.unwrap(),
                socket.next().await.unwrap(),
                socket.next().await.unwrap(),
            ]
        };
        let ((), frames) = tokio::join!(server, ours);
        let expected = [
            Frame::Text("a".into()),
            Frame::Binary(Bytes::from_static(b"\xff")),
            Frame::Closed(1012),
        ];
        assert_eq!(frames, expected);
    }

    #[tokio::test]
    async fn a_refusal_instead_of_an_upgrade_gives_the_servers_own_sentence() {
        let (listener, client) = listen().await;
        let server = async {
            let (mut stream, _) = listener.accept().await.unwrap();
            let body = r#"{"error":{"code":"not_found","message":"There is nothing here."}}"#;
            let head = format!("HTTP/1.1 404 Not Found\r\nContent-Length: {}\r\n\r\n", body.len());
            stream.write_all(format!("{head}{body}").as_bytes()).await.unwrap();
            stream
        };
        let (_stream, refused) = tokio::join!(server, client.socket("/x"));
        let error = refused.err().unwrap();
        assert_eq!(
            (error.status(), error.to_string().as_str()),
            (Some(404), "There is nothing here.")
        );
    }
}
