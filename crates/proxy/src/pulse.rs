//! Whether connections are still being accepted. It must not know what is done when they are not.

use std::sync::{Mutex, PoisonError};

use tokio::sync::{mpsc, oneshot};

/// Asks every loop that accepts connections for a sign of life.
#[derive(Default)]
pub struct Pulse(Mutex<Vec<mpsc::UnboundedSender<Asked>>>);

type Asked = oneshot::Sender<()>;

impl Pulse {
    /// For one loop more, which is to [`beat`](Heart::beat) whatever else it waits for.
    pub fn join(&self) -> Heart {
        let (ask, asked) = mpsc::unbounded_channel();
        self.0.lock().unwrap_or_else(PoisonError::into_inner).push(ask);
        Heart(asked)
    }

    /// Returns once every loop has answered; false where there is none, or where one has ended. A loop that hangs does
    /// not answer: the caller decides how long to wait.
    pub async fn is_felt(&self) -> bool {
        let loops = self.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let mut felt = !loops.is_empty();
        for ask in loops {
            let (answer, answered) = oneshot::channel();
            felt = felt && ask.send(answer).is_ok() && answered.await.is_ok();
        }
        felt
    }
}

/// The part of a [`Pulse`] that is in a loop.
pub struct Heart(mpsc::UnboundedReceiver<Asked>);

impl Heart {
    /// Waits until somebody asks, and answers. May be cancelled.
    pub async fn beat(&mut self) {
        match self.0.recv().await {
            // Who asked may have stopped waiting.
            Some(asked) => _ = asked.send(()),
            None => std::future::pending().await,
        }
    }
}
