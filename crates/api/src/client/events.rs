//! Server-sent events: bytes in, events out (WHATWG HTML, "Interpreting an event stream"). It must not know what an
//! event means.

use super::ClientError;

/// An event larger than this is not one of ours.
const MAX_EVENT: usize = 4 << 20;

/// One event.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ServerEvent {
    /// `message` where the server named none.
    pub name: String,
    pub data: String,
    pub id: Option<String>,
}

/// A stream of events that is being read.
#[derive(Debug)]
pub struct Events {
    answer: reqwest::Response,
    parser: Parser,
}

impl Events {
    pub(crate) fn new(answer: reqwest::Response) -> Self {
        Self {
            answer,
            parser: Parser::default(),
        }
    }

    /// The next event; `None` at the stream's end.
    ///
    /// # Errors
    /// [`ClientError::Unreachable`] where the connection broke, [`ClientError::Unexpected`] where this is no event
    /// stream.
    pub async fn next(&mut self) -> Result<Option<ServerEvent>, ClientError> {
        loop {
            if let Some(event) = self.parser.event() {
                return Ok(Some(event));
            }
            let url = self.answer.url().origin().ascii_serialization();
            match self
                .answer
                .chunk()
                .await
                .map_err(|e| ClientError::unreachable(&url, &e))?
            {
                Some(bytes) => self.parser.push(&bytes)?,
                None => return Ok(None),
            }
        }
    }
}

/// Bytes that are not yet an event.
#[derive(Debug, Default)]
struct Parser {
    bytes: Vec<u8>,
    /// Up to here there is no end of a line.
    searched: usize,
    event: ServerEvent,
    has_data: bool,
}

impl Parser {
    fn push(&mut self, bytes: &[u8]) -> Result<(), ClientError> {
        self.bytes.extend_from_slice(bytes);
        if self.bytes.len() + self.event.data.len() > MAX_EVENT {
            return Err(ClientError::Unexpected("an event is over 4 MiB".to_owned()));
        }
        Ok(())
    }

    fn event(&mut self) -> Option<ServerEvent> {
        let mut used = 0;
        let found = loop {
            let Some(length) = self.bytes[self.searched..].iter().position(|b| *b == b'\n') else {
                self.searched = self.bytes.len();
                break None;
            };
            let end = self.searched + length;
            let line = String::from_utf8_lossy(&self.bytes[used..end]).into_owned();
            (used, self.searched) = (end + 1, end + 1);
            if let Some(event) = self.line(line.strip_suffix('\r').unwrap_or(&line)) {
                break Some(event);
            }
        };
        self.bytes.drain(..used);
        self.searched -= used;
        found
    }

    fn line(&mut self, line: &str) -> Option<ServerEvent> {
        if line.is_empty() {
            let mut event = std::mem::take(&mut self.event);
            if !std::mem::take(&mut self.has_data) {
                return None;
            }
            if event.name.is_empty() {
                "message".clone_into(&mut event.name);
            }
            return Some(event);
        }
        let (field, value) = line.split_once(':').unwrap_or((line, ""));
        let value = value.strip_prefix(' ').unwrap_or(value);
        match field {
            "event" => value.clone_into(&mut self.event.name),
            "id" => self.event.id = Some(value.to_owned()),
            "data" => {
                if std::mem::replace(&mut self.has_data, true) {
                    self.event.data.push('\n');
                }
                self.event.data.push_str(value);
            }
            _ => {}
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(chunks: &[&str]) -> Vec<(String, String, Option<String>)> {
        let mut parser = Parser::default();
        let mut found = Vec::new();
        for chunk in chunks {
            parser.push(chunk.as_bytes()).unwrap();
            while let Some(e) = parser.event() {
                found.push((e.name, e.data, e.id));
            }
        }
        found
    }

    #[test]
    fn an_event_is_the_same_however_its_bytes_arrive() {
        let text = ": hello\nevent: line\nid: 7\ndata: a\ndata: b\n\ndata:c\r\n\r\n";
        let whole = parse(&[text]);
        assert_eq!(
            whole,
            [
                ("line".into(), "a\nb".into(), Some("7".into())),
                ("message".into(), "c".into(), None)
            ]
        );
        let single: Vec<&str> = text.split_inclusive(|_| true).collect();
        assert_eq!(parse(&single), whole);
    }

    #[test]
    fn an_event_without_data_or_without_its_end_is_no_event() {
        assert!(parse(&["event: x\n\n", ": ping\n\n", "data: unfinished\n"]).is_empty());
    }

    #[test]
    fn an_event_without_end_is_refused() {
        let mut parser = Parser::default();
        let chunk = vec![b'x'; 1 << 20];
        assert!((0..5).any(|_| parser.push(&chunk).is_err()));
    }
}
