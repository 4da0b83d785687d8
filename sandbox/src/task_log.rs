//! The numbered events of one task: the newest in memory, older ones in a file, the oldest dropped. Readers ask for
//! what comes after a number. It must not know what the events mean.

use std::collections::VecDeque;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileExt};
use std::path::PathBuf;

use bytes::Bytes;
use rustix::fs::FallocateFlags;

/// Bytes kept in memory while the task runs.
const MEMORY: usize = 1 << 20;
/// Bytes kept in memory once it has ended; more goes to the file.
const MEMORY_ENDED: usize = 4 << 10;
/// Bytes kept in the file.
const FILE: u64 = 64 << 20;
/// Bytes of the file per entry of its index, which is also the most that one read takes.
const STRIDE: u64 = 64 << 10;
/// What an event costs in memory beside its data.
const OVERHEAD: usize = 64;
/// In the file: number, kind and length come before the data.
const HEADER: usize = 8 + 1 + 4;

/// One event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    pub seq: u64,
    /// The caller's.
    pub kind: u8,
    pub data: Bytes,
}

/// The events of one task. Numbers start at 1 and have no holes.
#[derive(Debug)]
pub struct TaskLog {
    ring: VecDeque<Record>,
    /// Of the ring, `OVERHEAD` included.
    bytes: usize,
    last: u64,
    directory: PathBuf,
    spill: Option<Spill>,
}

/// Older events in a file. What is dropped becomes a hole at its front, so offsets never change.
#[derive(Debug)]
struct Spill {
    file: File,
    /// Number and offset of some events, the first there included, `STRIDE` or more apart.
    index: VecDeque<(u64, u64)>,
    end: u64,
}

impl TaskLog {
    /// An empty log that makes its file, if it needs one, in `directory`.
    pub fn new(directory: PathBuf) -> Self {
        Self {
            ring: VecDeque::new(),
            bytes: 0,
            last: 0,
            directory,
            spill: None,
        }
    }

    /// Number of the newest event; 0 where there is none.
    pub fn last(&self) -> u64 {
        self.last
    }

    /// Number of the oldest event that is left.
    pub fn first(&self) -> u64 {
        let spilled = self.spill.as_ref().and_then(|s| s.index.front()).map(|(seq, _)| *seq);
        spilled.or(self.ring.front().map(|r| r.seq)).unwrap_or(self.last + 1)
    }

    /// Bytes in the file.
    pub fn spilled(&self) -> u64 {
        self.spill.as_ref().map_or(0, Spill::size)
    }

    /// Adds an event and gives it the next number.
    pub fn push(&mut self, kind: u8, data: Bytes) {
        self.last += 1;
        self.bytes += data.len() + OVERHEAD;
        self.ring.push_back(Record {
            seq: self.last,
            kind,
            data,
        });
        if self.bytes > MEMORY {
            self.shrink(MEMORY * 3 / 4);
        }
    }

    /// The task has ended: frees most of the memory.
    pub fn end(&mut self) {
        if self.bytes > MEMORY_ENDED {
            self.shrink(0);
        }
        self.ring.shrink_to_fit();
    }

    /// Some of the events after number `after`, oldest first; none where there are none yet. The first one's number
    /// is greater than `after + 1` where events were dropped.
    pub fn read(&self, after: u64) -> Vec<Record> {
        let in_memory = self.ring.front().map_or(self.last + 1, |r| r.seq);
        let from = (after + 1).max(self.first());
        if from < in_memory
            && let Some(spill) = &self.spill
            && let Ok(records) = spill.read(from)
        {
            return records;
        }
        let skip = usize::try_from(from.saturating_sub(in_memory)).unwrap_or(usize::MAX);
        let mut size = 0;
        let fits = |r: &&Record| {
            size += r.data.len() + OVERHEAD;
            size < STRIDE as usize || size == r.data.len() + OVERHEAD
        };
        self.ring.iter().skip(skip).take_while(fits).cloned().collect()
    }

    /// Moves the oldest events to the file until at most `target` bytes are in memory. Where the file cannot be
    /// written, what was in it and what should go there is dropped: the disk is the user's to fill.
    fn shrink(&mut self, target: usize) {
        let mut moved = Vec::new();
        while self.bytes > target
            && let Some(record) = self.ring.pop_front()
        {
            self.bytes -= record.data.len() + OVERHEAD;
            moved.push(record);
        }
        let spill = match self.spill.take() {
            Some(spill) => Ok(spill),
            None => Spill::create(&self.directory),
        };
        self.spill = spill.and_then(|mut s| s.append(&moved).map(|()| s)).ok();
    }
}

impl Drop for TaskLog {
    fn drop(&mut self) {
        if self.spill.take().is_some() {
            // What stays behind is removed at the next start.
            let _ = fs::remove_dir_all(&self.directory);
        }
    }
}

impl Spill {
    fn create(directory: &PathBuf) -> io::Result<Self> {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
        let mut options = fs::OpenOptions::new();
        let file = options.read(true).write(true).create(true).truncate(true);
        Ok(Self {
            file: file.open(directory.join("output"))?,
            index: VecDeque::new(),
            end: 0,
        })
    }

    fn size(&self) -> u64 {
        self.end - self.index.front().map_or(self.end, |(_, offset)| *offset)
    }

    fn append(&mut self, records: &[Record]) -> io::Result<()> {
        let mut bytes = Vec::new();
        for record in records {
            let offset = self.end + bytes.len() as u64;
            if self.index.back().is_none_or(|(_, last)| offset - last >= STRIDE) {
                self.index.push_back((record.seq, offset));
            }
            let length = u32::try_from(record.data.len()).map_err(io::Error::other)?;
            bytes.extend_from_slice(&record.seq.to_le_bytes());
            bytes.push(record.kind);
            bytes.extend_from_slice(&length.to_le_bytes());
            bytes.extend_from_slice(&record.data);
        }
        self.file.write_all_at(&bytes, self.end)?;
        self.end += bytes.len() as u64;
        self.drop_oldest()
    }

    fn drop_oldest(&mut self) -> io::Result<()> {
        let mut dropped = false;
        while self.size() > FILE && self.index.len() > 1 {
            self.index.pop_front();
            dropped = true;
        }
        if dropped {
            let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            rustix::fs::fallocate(&self.file, hole, 0, self.end - self.size())?;
        }
        Ok(())
    }

    /// The events from number `from` on to the next entry of the index.
    fn read(&self, from: u64) -> io::Result<Vec<Record>> {
        let after = self.index.partition_point(|(seq, _)| *seq <= from);
        let missing = || io::Error::from(io::ErrorKind::NotFound);
        let (_, start) = after
            .checked_sub(1)
            .and_then(|i| self.index.get(i))
            .ok_or_else(missing)?;
        let end = self.index.get(after).map_or(self.end, |(_, offset)| *offset);
        let mut buffer = vec![0; usize::try_from(end - start).map_err(io::Error::other)?];
        self.file.read_exact_at(&mut buffer, *start)?;
        let mut bytes = Bytes::from(buffer);
        let mut records = Vec::new();
        while bytes.len() >= HEADER {
            let header = bytes.split_to(HEADER);
            let seq = u64::from_le_bytes(header[..8].try_into().map_err(io::Error::other)?);
            let length = u32::from_le_bytes(header[9..].try_into().map_err(io::Error::other)?) as usize;
            if length > bytes.len() {
                return Err(io::Error::from(io::ErrorKind::InvalidData));
            }
            let data = bytes.split_to(length);
            if seq >= from {
                records.push(Record {
                    seq,
                    kind: header[8],
                    data,
                });
            }
        }
        Ok(records)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log() -> (tempfile::TempDir, TaskLog) {
        let directory = tempfile::tempdir().unwrap();
        let log = TaskLog::new(directory.path().join("t"));
        (directory, log)
    }

    /// Reads on from `after` to the end as a client does, checking the order.
    fn read_all(log: &TaskLog, mut after: u64) -> Vec<Record> {
        let mut all: Vec<Record> = Vec::new();
        loop {
            let some = log.read(after);
            let Some(last) = some.last() else { return all };
            after = last.seq;
            all.extend(some);
        }
    }

    fn data(n: u64) -> Bytes {
        Bytes::from(n.to_string().repeat(1 + n as usize % 300))
    }

    #[test]
    fn every_event_is_read_once_and_in_order_from_memory_and_file() {
        let (_directory, mut log) = log();
        for n in 1..=20_000 {
            log.push((n % 3) as u8, data(n));
        }
        assert!(log.spilled() > 5 << 20);
        for after in [0, 1, 77, 9_999, 19_998, 19_999, 20_000, 30_000] {
            let got = read_all(&log, after);
            assert_eq!(got.len() as u64, 20_000u64.saturating_sub(after));
            for (record, n) in got.iter().zip(after + 1..) {
                assert_eq!((record.seq, record.kind, &record.data), (n, (n % 3) as u8, &data(n)));
            }
        }
        log.end();
        assert!(log.ring.is_empty());
        assert_eq!(read_all(&log, 0).len(), 20_000);
    }

    #[test]
    fn what_is_too_much_is_dropped_from_the_front_and_frees_its_blocks() {
        let (directory, mut log) = log();
        let piece = Bytes::from(vec![7; 16 << 10]);
        for _ in 0..6000 {
            log.push(0, piece.clone());
        }
        assert!(log.spilled() <= FILE);
        assert!(log.first() > 1);
        let got = read_all(&log, 0);
        assert_eq!(got[0].seq, log.first());
        assert_eq!(got.last().unwrap().seq, 6000);
        assert!(got.windows(2).all(|w| w[1].seq == w[0].seq + 1));
        let file = fs::metadata(directory.path().join("t/output")).unwrap();
        assert!(std::os::unix::fs::MetadataExt::blocks(&file) * 512 <= FILE + (1 << 20));
    }

    #[test]
    fn without_a_disk_the_newest_events_stay() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut log = TaskLog::new(file.path().join("not-a-directory"));
        for n in 1..=5000 {
            log.push(0, data(n));
        }
        let got = read_all(&log, 0);
        assert!(got[0].seq > 1);
        assert_eq!(got.last().unwrap().seq, 5000);
    }

    #[test]
    fn a_dropped_log_leaves_no_file() {
        let (directory, mut log) = log();
        for n in 1..=20_000 {
            log.push(0, data(n));
        }
        assert!(directory.path().join("t").exists());
        drop(log);
        assert!(!directory.path().join("t").exists());
    }
}
