//! The text of the events that are published. Made once for each project and class; then only the number changes, so that
//! publishing costs next to nothing.

use anyhow::ensure;
use jiff::Timestamp;

use super::sequence::{DIGITS_AT, Plan};

/// Text that compresses about as well as what people write.
const WORDS: &str = "frame rendered and written to the store; the next one waits for its textures, lights and \
                     shadows, while 17 of 42 parts of the scene have been checked twice against the plan of Monday. ";

/// The events of a plan.
#[derive(Debug)]
pub(super) struct Events {
    plan: Plan,
    latest: Vec<Box<[u8]>>,
    durable: Vec<Box<[u8]>>,
}

impl Events {
    /// Events of `bytes` in all, for the projects `{project}-0`, `{project}-1` …
    pub(super) fn new(plan: Plan, project: &str, bytes: usize) -> anyhow::Result<Self> {
        let timestamp = Timestamp::now();
        let all = |fields: &str| {
            (0..plan.projects)
                .map(|number| {
                    let id = project_id(project, number);
                    let start = format!(
                        "{{\"n\":\"00000000\",{fields},\"project_id\":\"{id}\",\"timestamp\":\"{timestamp:.6}\",\
                         \"message\":\""
                    );
                    let least = start.len() + 2;
                    ensure!(bytes >= least, "--event-bytes {bytes}: the fields alone take {least}");
                    let text: String = WORDS.chars().cycle().take(bytes - least).collect();
                    Ok(format!("{start}{text}\"}}").into_bytes().into_boxed_slice())
                })
                .collect::<anyhow::Result<Vec<_>>>()
        };
        let progress = "\"progress\":{\"current\":17,\"total\":42,\"percentage\":40.48}";
        Ok(Self {
            plan,
            latest: all(&format!("\"type\":\"task.progress\",\"task_id\":\"t\",{progress}"))?,
            durable: all("\"type\":\"custom.event\"")?,
        })
    }

    /// The text of event `n`.
    pub(super) fn text(&mut self, n: u32) -> &[u8] {
        let texts = if self.plan.is_durable(n) { &mut self.durable } else { &mut self.latest };
        let text = &mut texts[self.plan.project(n) as usize];
        let mut rest = n;
        for digit in text[DIGITS_AT].iter_mut().rev() {
            *digit = b"0123456789"[(rest % 10) as usize];
            rest /= 10;
        }
        text
    }
}

/// The name of a project.
pub(super) fn project_id(prefix: &str, number: u32) -> String {
    format!("{prefix}-{number}")
}

#[cfg(test)]
mod tests {
    use tidings_protocol::Event;

    use super::*;
    use crate::cli::bench::sequence::{Mix, number};

    #[test]
    fn events_are_valid_have_their_number_and_their_size() {
        let plan = Plan { projects: 3, mix: Mix::DurableEvery(2) };
        let mut events = Events::new(plan, "bench", 250).unwrap();
        for n in [0, 1, 4, 12_345_678] {
            let text = events.text(n).to_vec();
            assert_eq!((text.len(), number(&text)), (250, Some(n)));
            Event::parse(&text, 1 << 20, Timestamp::now().into()).unwrap();
            let value: serde_json::Value = serde_json::from_slice(&text).unwrap();
            assert_eq!(value["project_id"], format!("bench-{}", n % 3));
            let expected = if plan.is_durable(n) { "custom.event" } else { "task.progress" };
            assert_eq!(value["type"], expected);
        }
        assert!(Events::new(plan, "bench", 100).unwrap_err().to_string().contains("the fields alone take"));
    }
}
