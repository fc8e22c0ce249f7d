//! The keys of publishers and operators: which one a request shows, and what it may do. Knows no request and no answer.

use std::{fmt, sync::Arc, time::Duration};

use sha2::{Digest as _, Sha256};
use subtle::{ConditionallySelectable as _, ConstantTimeEq as _};
use tidings_protocol::{Audience, Event, Projects, TypeFilter};

use crate::{
    config::{ADMIN, KEYLESS, KeySettings, Scope, Settings},
    rate::Rate,
};

/// Every key that the settings have.
#[derive(Debug)]
pub(crate) struct Keys {
    known: Vec<Known>,
    keyless: Arc<Key>,
}

struct Known {
    /// Of the key, so that all are of one length, and none lies about in memory.
    digest: [u8; 32],
    key: Arc<Key>,
}

impl fmt::Debug for Known {
    /// Without the digest, from which a short key could be guessed.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.key.fmt(f)
    }
}

/// What a key may do.
#[derive(Debug)]
pub(crate) struct Key {
    name: Arc<str>,
    admin: bool,
    scopes: Vec<Scope>,
    projects: Projects,
    types: TypeFilter,
    rate: Option<Rate>,
}

/// An event that a key may not publish.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outside {
    /// Its project is none of the key's.
    Project,
    /// It belongs to no project, which takes a right to all of them.
    NoProject,
    /// Its type is none of the key's.
    Type,
}

impl Outside {
    /// The field that is at fault.
    pub(crate) const fn field(self) -> &'static str {
        match self {
            Self::Project | Self::NoProject => "project_id",
            Self::Type => "type",
        }
    }

    /// For whoever has the key; says nothing of what it may.
    pub(crate) const fn message(self) -> &'static str {
        match self {
            Self::Project => "this key may not publish to this project",
            Self::NoProject => "only a key with `projects` `\"*\"` may publish what belongs to no project",
            Self::Type => "this key may not publish this type",
        }
    }
}

impl Keys {
    pub(crate) fn new(settings: &Settings) -> Self {
        let plain = settings.publish_keys.iter().enumerate();
        let plain = plain.map(|(index, key)| {
            (key, Key::to_everything(&format!("publish[{index}]"), &[Scope::Publish], settings))
        });
        let admin = settings
            .admin_key
            .iter()
            .map(|key| (key, Key { admin: true, ..Key::to_everything(ADMIN, &Scope::ALL, settings) }));
        let scoped = settings.keys.iter().map(|scoped| (&scoped.key, Key::scoped(scoped, settings)));
        let known = scoped.chain(plain).chain(admin);
        Self {
            // The last of several that are the same counts, so that the admin's is never less than it should be.
            known: known.map(|(key, may)| Known { digest: digest(key), key: Arc::new(may) }).collect(),
            keyless: Arc::new(Key::to_everything(KEYLESS, &Scope::ALL, settings)),
        }
    }

    /// Whether there are none, not even the admin's.
    pub(crate) fn is_empty(&self) -> bool {
        self.known.is_empty()
    }

    /// Whether there are others than the admin's.
    pub(crate) fn are_needed(&self) -> bool {
        self.known.iter().any(|known| !known.key.admin)
    }

    /// Whether the admin has one.
    pub(crate) fn has_admin(&self) -> bool {
        self.known.iter().any(|known| known.key.admin)
    }

    /// The key that was given. It takes the same time whatever was given, and whichever it is.
    pub(crate) fn find(&self, given: &str) -> Option<&Arc<Key>> {
        let given = digest(given);
        let mut found = u64::MAX;
        for (index, known) in (0..).zip(&self.known) {
            found.conditional_assign(&index, known.digest.ct_eq(&given));
        }
        usize::try_from(found).ok().and_then(|index| self.known.get(index)).map(|known| &known.key)
    }

    /// What stands for whoever needs no key.
    pub(crate) fn keyless(&self) -> &Arc<Key> {
        &self.keyless
    }
}

impl Key {
    fn to_everything(name: &str, scopes: &[Scope], settings: &Settings) -> Self {
        Self {
            name: name.into(),
            admin: false,
            scopes: scopes.to_vec(),
            projects: Projects::everything(),
            types: TypeFilter::everything(),
            rate: settings.publish_rate_max.map(Rate::new),
        }
    }

    fn scoped(scoped: &KeySettings, settings: &Settings) -> Self {
        Self {
            name: scoped.name.as_str().into(),
            admin: false,
            scopes: scoped.scopes.clone(),
            projects: scoped.projects.clone(),
            types: scoped.types.clone(),
            rate: scoped.rate.or(settings.publish_rate_max).map(Rate::new),
        }
    }

    /// The operator's name for it.
    pub(crate) fn name(&self) -> &Arc<str> {
        &self.name
    }

    /// Whether it may do everything.
    pub(crate) fn is_admin(&self) -> bool {
        self.admin
    }

    /// Whether it is for this.
    pub(crate) fn is_for(&self, scope: Scope) -> bool {
        self.scopes.contains(&scope)
    }

    /// The projects that it reaches.
    pub(crate) fn projects(&self) -> &Projects {
        &self.projects
    }

    /// The events that it may publish.
    pub(crate) fn types(&self) -> &TypeFilter {
        &self.types
    }

    /// Why it may not publish the event; nothing: it may.
    pub(crate) fn outside(&self, event: &Event) -> impl Iterator<Item = Outside> {
        let project = match event.audience() {
            Audience::Project(project) | Audience::RightsToProject(project) => {
                (!self.projects.include(project)).then_some(Outside::Project)
            }
            // Whoever may say something to everybody may say it to every project.
            Audience::RightsToEverything | Audience::Everyone => {
                (!self.projects.is_everything()).then_some(Outside::NoProject)
            }
        };
        let its_type = (!self.types.matches(event.event_type())).then_some(Outside::Type);
        project.into_iter().chain(its_type)
    }

    /// Takes so many events off what it may publish now, or says after how long so many would fit.
    pub(crate) fn take(&self, events: usize) -> Result<(), Duration> {
        let events = u32::try_from(events).unwrap_or(u32::MAX);
        self.rate.as_ref().map_or(Ok(()), |rate| rate.take(events))
    }
}

fn digest(key: &str) -> [u8; 32] {
    Sha256::digest(key.as_bytes()).into()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::config::{Flags, Layers};

    fn keys(variables: &[(&str, &str)]) -> Keys {
        let variables: BTreeMap<_, _> =
            variables.iter().map(|&(name, value)| (name.to_owned(), value.to_owned())).collect();
        Keys::new(&Settings::read(&Layers::load(&Flags::default(), &variables, None).unwrap()).unwrap())
    }

    #[test]
    fn every_key_is_found_by_itself_and_by_nothing_like_it() {
        let scoped = r#"[{"name":"web","key":"0123456789abcdef"},{"name":"ci","key":"fedcba9876543210"}]"#;
        let keys = keys(&[
            ("TIDINGS_PUBLISH_KEYS", "one,two"),
            ("TIDINGS_ADMIN_KEY", "adm"),
            ("TIDINGS_KEYS", scoped),
        ]);
        let name = |given: &str| keys.find(given).map(|key| key.name().to_string());
        for (given, expected) in [
            ("one", "publish[0]"),
            ("two", "publish[1]"),
            ("adm", "admin"),
            ("0123456789abcdef", "web"),
            ("fedcba9876543210", "ci"),
        ] {
            assert_eq!(name(given).as_deref(), Some(expected), "{given}");
        }
        for given in ["", "on", "onee", "One", "one,two", "0123456789abcde", "web"] {
            assert_eq!(name(given), None, "{given}");
        }
        assert!(keys.find("adm").unwrap().is_admin() && !keys.find("one").unwrap().is_for(Scope::Tickets));
        assert!(!format!("{keys:?}").contains("0123"), "{keys:?}");
    }

    #[test]
    fn an_admins_key_that_is_listed_again_stays_the_admins() {
        let keys = keys(&[("TIDINGS_PUBLISH_KEYS", "same"), ("TIDINGS_ADMIN_KEY", "same")]);
        assert!(keys.find("same").unwrap().is_admin());
    }

    #[track_caller]
    fn check(key: &Key, event: &str, expected: &[Outside]) {
        let event = Event::parse(event.as_bytes(), 10_000, jiff::Timestamp::now().into()).unwrap();
        assert_eq!(key.outside(&event).collect::<Vec<_>>(), expected, "{event:?}");
    }

    #[test]
    fn an_event_has_to_be_within_the_projects_and_the_types() {
        let scoped = r#"[{"name":"a","key":"0123456789abcdef","projects":["p","team/*"],"types":["task.*","project.updated"]},
            {"name":"b","key":"fedcba9876543210","types":["notice.posted","workspace.*"]}]"#;
        let keys = keys(&[("TIDINGS_KEYS", scoped)]);
        let some = keys.find("0123456789abcdef").unwrap();
        let started = |project: &str| {
            format!(r#"{{"type":"task.started","project_id":"{project}","task_id":"t","task_name":"n"}}"#)
        };
        check(some, &started("p"), &[]);
        check(some, &started("team/web"), &[]);
        check(some, &started("q"), &[Outside::Project]);
        check(some, r#"{"type":"a.b","project_id":"p"}"#, &[Outside::Type]);
        check(some, r#"{"type":"a.b","project_id":"q"}"#, &[Outside::Project, Outside::Type]);
        check(some, r#"{"type":"task.noted"}"#, &[Outside::NoProject]);
        check(some, r#"{"type":"project.updated","project_id":"p"}"#, &[]);
        check(some, r#"{"type":"project.updated","data":{"id":"q"}}"#, &[Outside::Project]);
        let workspace = r#"{"type":"workspace.changed","workspace_id":"w","changes":{}}"#;
        check(some, workspace, &[Outside::NoProject, Outside::Type]);
        let all = keys.find("fedcba9876543210").unwrap();
        check(all, workspace, &[]);
        check(all, r#"{"type":"notice.posted"}"#, &[]);
        check(all, &started("p"), &[Outside::Type]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_keys_own_rate_stands_over_that_of_all() {
        let scoped =
            r#"[{"name":"a","key":"0123456789abcdef","rate":2},{"name":"b","key":"fedcba9876543210"}]"#;
        let keys = keys(&[("TIDINGS_KEYS", scoped), ("TIDINGS_PUBLISH_RATE_MAX", "4")]);
        let admits = |given: &str| {
            let key = keys.find(given).unwrap();
            (0..10).filter(|_| key.take(1).is_ok()).count()
        };
        assert_eq!((admits("0123456789abcdef"), admits("fedcba9876543210")), (2, 4));
        assert_eq!((0..10).filter(|_| keys.keyless().take(1).is_ok()).count(), 4);
    }
}
