//! The layers that settings come from: flags over environment over `.env` over the file over defaults.

use std::{
    collections::BTreeMap,
    fmt,
    path::{Path, PathBuf},
};

use super::{SETTINGS, Setting, table::OF_PUBLISHERS};

/// What the command line says about settings.
#[derive(Clone, Debug, Default)]
pub struct Flags {
    /// `--config FILE`; without it `tidings.toml` is read if it is there.
    pub file: Option<PathBuf>,
    /// `--set NAME=VALUE` and the flags that stand for settings.
    pub values: Vec<(String, String)>,
}

/// Where a value came from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// Nothing set it.
    Default,
    /// `tidings.toml`.
    File(PathBuf),
    /// `.env`, in development only.
    DotEnv(PathBuf),
    /// An environment variable.
    Environment,
    /// The file that `NAME_FILE` names.
    SecretFile(PathBuf),
    /// The command line.
    Flag,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Default => f.write_str("default"),
            Self::File(path) | Self::DotEnv(path) | Self::SecretFile(path) => write!(f, "{}", path.display()),
            Self::Environment => f.write_str("environment"),
            Self::Flag => f.write_str("command line"),
        }
    }
}

/// A value and where it came from.
#[derive(Clone, Debug)]
pub struct Value {
    /// As it was written.
    pub text: String,
    /// By whom.
    pub origin: Origin,
}

/// A setting that cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("{name}{}: {message}", origin.as_ref().map(|origin| format!(" (from {origin})")).unwrap_or_default())]
pub struct SettingError {
    name: String,
    origin: Option<Origin>,
    message: String,
}

impl SettingError {
    fn new(name: impl Into<String>, origin: Option<Origin>, message: impl Into<String>) -> Self {
        Self { name: name.into(), origin, message: message.into() }
    }
}

/// The values of all layers, put over one another.
#[derive(Debug, Default)]
pub struct Layers {
    values: BTreeMap<&'static str, Value>,
    workspaces: BTreeMap<String, String>,
    warnings: Vec<String>,
}

type Variables = BTreeMap<String, String>;

impl Layers {
    /// Puts flags, `variables` of the environment, the `.env` beside `dot_env_in` and the file over one another.
    pub fn load(
        flags: &Flags,
        variables: &Variables,
        dot_env_in: Option<&Path>,
    ) -> Result<Self, SettingError> {
        let mut layers = Self::default();
        layers.add_file(flags.file.as_deref(), dot_env_in)?;
        let mut upper = Self::default();
        upper.add_variables(variables, &Origin::Environment)?;
        upper.add_flags(flags)?;
        let named = upper.values.get("ENVIRONMENT").or_else(|| layers.values.get("ENVIRONMENT"));
        let development = named.is_none_or(|value| value.text == "development");
        if let (true, Some(folder)) = (development, dot_env_in) {
            layers.add_dot_env(&folder.join(".env"))?;
        }
        layers.put_over(upper)?;
        Ok(layers)
    }

    /// Puts another layer over this one.
    fn put_over(&mut self, upper: Self) -> Result<(), SettingError> {
        // Tables add up in everybody's mind: that some of them are silently none would be found out too late.
        for setting in SETTINGS.iter().filter(|setting| setting.tables) {
            let name = setting.name;
            if let Some((above, below)) = upper.values.get(name).zip(self.values.get(name)) {
                let message = format!("{} has some, too; expected them in one of the two", below.origin);
                return Err(SettingError::new(name, Some(above.origin.clone()), message));
            }
        }
        self.values.extend(upper.values);
        self.warnings.extend(upper.warnings);
        Ok(())
    }

    /// What should be said although it is no error.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// Every setting with its effective value; `None`: unset. Secrets are masked.
    pub fn effective(&self) -> impl Iterator<Item = (&'static Setting, Option<String>, Origin)> {
        SETTINGS.iter().map(|setting| match self.values.get(setting.name) {
            Some(value) => (setting, Some(shown(setting, &value.text)), value.origin.clone()),
            None => (setting, setting.default.map(str::to_owned), Origin::Default),
        })
    }

    /// The `[workspaces]` table of the file.
    pub fn workspaces(&self) -> &BTreeMap<String, String> {
        &self.workspaces
    }

    pub(super) fn optional(&self, name: &'static str) -> Option<&str> {
        let default =
            || SETTINGS.iter().find(|setting| setting.name == name).and_then(|setting| setting.default);
        self.values.get(name).map(|value| value.text.as_str()).or_else(default)
    }

    pub(super) fn is_set(&self, name: &'static str) -> bool {
        self.values.contains_key(name)
    }

    pub(super) fn text(&self, name: &'static str) -> String {
        self.optional(name).unwrap_or_default().to_owned()
    }

    pub(super) fn list(&self, name: &'static str) -> Vec<String> {
        let items = self.optional(name).unwrap_or_default().split(',').map(str::trim);
        items.filter(|item| !item.is_empty()).map(str::to_owned).collect()
    }

    pub(super) fn number<T: TryFrom<u64>>(
        &self,
        name: &'static str,
        min: u64,
        max: u64,
    ) -> Result<T, SettingError> {
        let number = self.optional(name).and_then(|text| text.trim().parse().ok());
        number
            .filter(|number| (min..=max).contains(number))
            .and_then(|number| T::try_from(number).ok())
            .ok_or_else(|| {
                self.error(name, format!("expected a whole number from {min} to {max}{}", self.found(name)))
            })
    }

    /// As [`Layers::number`]; `None`: unset.
    pub(super) fn optional_number<T: TryFrom<u64>>(
        &self,
        name: &'static str,
        min: u64,
        max: u64,
    ) -> Result<Option<T>, SettingError> {
        self.optional(name).map(|_| self.number(name, min, max)).transpose()
    }

    pub(super) fn choice<T: Copy>(
        &self,
        name: &'static str,
        choices: &[(&str, T)],
    ) -> Result<T, SettingError> {
        let text = self.optional(name).unwrap_or_default();
        choices.iter().find(|(word, _)| *word == text).map(|(_, choice)| *choice).ok_or_else(|| {
            let words: Vec<_> = choices.iter().map(|(word, _)| format!("`{word}`")).collect();
            self.error(name, format!("expected one of {}{}", words.join(", "), self.found(name)))
        })
    }

    pub(super) fn error(&self, name: &str, message: impl Into<String>) -> SettingError {
        SettingError::new(name, self.values.get(name).map(|value| value.origin.clone()), message)
    }

    /// An error at a place within a setting's value.
    pub(super) fn error_at(&self, name: &str, place: &str, message: impl Into<String>) -> SettingError {
        let origin = self.values.get(name).map(|value| value.origin.clone());
        let name = match (&origin, place) {
            (_, "") => name.to_owned(),
            (Some(Origin::File(_)), _) => place.to_owned(),
            _ => format!("{name}: {place}"),
        };
        SettingError::new(name, origin, message)
    }

    pub(super) fn found(&self, name: &str) -> String {
        self.values.get(name).map(|value| format!(", found `{}`", value.text)).unwrap_or_default()
    }

    fn add_flags(&mut self, flags: &Flags) -> Result<(), SettingError> {
        for (name, value) in &flags.values {
            let setting = find(name).ok_or_else(|| unknown(name, Some(Origin::Flag)))?;
            self.set(setting, value.clone(), Origin::Flag);
        }
        Ok(())
    }

    fn add_variables(&mut self, variables: &Variables, origin: &Origin) -> Result<(), SettingError> {
        for (name, value) in variables.iter().filter(|(_, value)| !value.is_empty()) {
            if let Some(setting) = exactly(name) {
                self.set(setting, value.clone(), origin.clone());
            } else if let Some(setting) = name.strip_suffix("_FILE").and_then(exactly) {
                if variables.get(setting.name).is_some_and(|value| !value.is_empty()) {
                    let message = format!("`{}` is set, too; expected one of the two", setting.name);
                    return Err(SettingError::new(name, Some(origin.clone()), message));
                }
                let text = std::fs::read_to_string(value).map_err(|error| {
                    SettingError::new(name, Some(origin.clone()), format!("cannot read `{value}`: {error}"))
                })?;
                self.set(setting, text.trim().to_owned(), Origin::SecretFile(value.into()));
            } else if name.starts_with("TIDINGS_") && !OF_PUBLISHERS.contains(&name.as_str()) {
                self.warnings.push(unknown(name, Some(origin.clone())).to_string());
            }
        }
        Ok(())
    }

    fn add_dot_env(&mut self, path: &Path) -> Result<(), SettingError> {
        if !path.exists() {
            return Ok(());
        }
        let origin = Origin::DotEnv(path.to_owned());
        let invalid =
            |error: dotenvy::Error| SettingError::new(".env", Some(origin.clone()), error.to_string());
        let variables: Variables =
            dotenvy::from_path_iter(path).map_err(invalid)?.collect::<Result<_, _>>().map_err(invalid)?;
        let mut dot_env = Self::default();
        dot_env.add_variables(&variables, &origin)?;
        if dot_env.values.remove("ENVIRONMENT").is_some_and(|value| value.text != "development") {
            self.warnings.push(format!(
                "{}: ENVIRONMENT is ignored here, because the file is for development only",
                path.display()
            ));
        }
        self.put_over(dot_env)
    }

    fn add_file(&mut self, named: Option<&Path>, folder: Option<&Path>) -> Result<(), SettingError> {
        let default = folder.map(|folder| folder.join("tidings.toml")).filter(|path| path.exists());
        let Some(path) = named.map(Path::to_owned).or(default) else { return Ok(()) };
        let origin = Origin::File(path.clone());
        let invalid = |message: String| SettingError::new("--config", Some(origin.clone()), message);
        let text =
            std::fs::read_to_string(&path).map_err(|error| invalid(format!("cannot be read: {error}")))?;
        let table: toml::Table = text.parse().map_err(|error| invalid(told(&error, &text)))?;
        self.add_table("", &table, &origin)
    }

    fn add_table(&mut self, prefix: &str, table: &toml::Table, origin: &Origin) -> Result<(), SettingError> {
        for (name, value) in table {
            let key = format!("{prefix}{name}");
            match value {
                toml::Value::Table(table) if key == "workspaces" => {
                    for (workspace, project) in table {
                        let project = project.as_str().ok_or_else(|| {
                            let message = "expected the id of a project, as a string";
                            SettingError::new(
                                format!("workspaces.{workspace}"),
                                Some(origin.clone()),
                                message,
                            )
                        })?;
                        self.workspaces.insert(workspace.clone(), project.to_owned());
                    }
                }
                value if let Some(setting) = list_of_tables(&key) => {
                    let header = format!("[[{prefix}{name}]]", prefix = prefix.replace('_', "."));
                    let text = serde_json::to_string(value).ok().filter(|_| value.is_array());
                    let text = text.ok_or_else(|| {
                        SettingError::new(&key, Some(origin.clone()), format!("expected tables, `{header}`"))
                    })?;
                    self.set(setting, text, origin.clone());
                }
                toml::Value::Table(table) => self.add_table(&format!("{key}_"), table, origin)?,
                value => {
                    let setting = SETTINGS.iter().find(|setting| setting.key() == key);
                    let setting = setting.ok_or_else(|| unknown_key(&key, origin))?;
                    let text = text_of(value).ok_or_else(|| {
                        SettingError::new(&key, Some(origin.clone()), "expected text, a number or a list")
                    })?;
                    self.set(setting, text, origin.clone());
                }
            }
        }
        Ok(())
    }

    fn set(&mut self, setting: &'static Setting, text: String, origin: Origin) {
        self.values.insert(setting.name, Value { text, origin });
    }
}

/// What is wrong with the file and where, without the line itself, which may hold a secret.
fn told(error: &toml::de::Error, text: &str) -> String {
    let line = error.span().map(|span| text[..span.start.min(text.len())].lines().count().max(1));
    let line = line.map(|line| format!(" at line {line}")).unwrap_or_default();
    format!("no TOML{line}: {}", error.message())
}

fn text_of(value: &toml::Value) -> Option<String> {
    Some(match value {
        toml::Value::String(text) => text.clone(),
        toml::Value::Integer(number) => number.to_string(),
        toml::Value::Float(number) => number.to_string(),
        toml::Value::Boolean(flag) => flag.to_string(),
        toml::Value::Array(items) => items.iter().map(text_of).collect::<Option<Vec<_>>>()?.join(","),
        toml::Value::Table(_) | toml::Value::Datetime(_) => return None,
    })
}

/// A setting that is a list of tables, by its key.
fn list_of_tables(key: &str) -> Option<&'static Setting> {
    SETTINGS.iter().find(|setting| setting.tables && setting.key() == key)
}

/// A setting by its variable. The environment is full of other programs' variables, so nothing near counts.
fn exactly(name: &str) -> Option<&'static Setting> {
    SETTINGS.iter().find(|setting| setting.name == name)
}

/// A setting by its variable or by its key in the file.
fn find(name: &str) -> Option<&'static Setting> {
    SETTINGS
        .iter()
        .find(|setting| setting.name.eq_ignore_ascii_case(name) || setting.key() == name.to_ascii_lowercase())
}

fn unknown(name: &str, origin: Option<Origin>) -> SettingError {
    let nearest = nearest(&name.to_ascii_uppercase(), SETTINGS.iter().map(|setting| setting.name.to_owned()));
    SettingError::new(name, origin, format!("is no setting{nearest}"))
}

fn unknown_key(key: &str, origin: &Origin) -> SettingError {
    let keys = SETTINGS.iter().map(Setting::key).chain(["workspaces".to_owned()]);
    SettingError::new(key, Some(origin.clone()), format!("is no key{}", nearest(key, keys)))
}

pub(super) fn nearest(name: &str, known: impl Iterator<Item = String>) -> String {
    let nearest =
        known.max_by(|a, b| strsim::jaro_winkler(name, a).total_cmp(&strsim::jaro_winkler(name, b)));
    nearest.map(|known| format!("; did you mean `{known}`?")).unwrap_or_default()
}

fn shown(setting: &Setting, text: &str) -> String {
    if setting.secret { "********".to_owned() } else { text.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::keys;

    fn folder(files: &[(&str, &str)]) -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in files {
            std::fs::write(folder.path().join(name), text).unwrap();
        }
        folder
    }

    fn variables(pairs: &[(&str, &str)]) -> Variables {
        pairs.iter().map(|&(name, value)| (name.to_owned(), value.to_owned())).collect()
    }

    #[test]
    fn each_layer_is_over_the_one_before() {
        let file = (
            "tidings.toml",
            "backend_port = 1\ndomain = 'file'\nbackend_host = 'file'\nredis_channel = 'file'",
        );
        let dot_env = (".env", "DOMAIN=dotenv\nBACKEND_HOST=dotenv\nREDIS_CHANNEL=dotenv");
        let folder = folder(&[file, dot_env]);
        let flags = Flags { file: None, values: vec![("REDIS_CHANNEL".into(), "flag".into())] };
        let environment = variables(&[("BACKEND_HOST", "env"), ("REDIS_CHANNEL", "env"), ("DOMAIN", "")]);
        let layers = Layers::load(&flags, &environment, Some(folder.path())).unwrap();
        let value = |name| (layers.values[name].text.as_str(), layers.values[name].origin.clone());
        assert_eq!(value("BACKEND_PORT"), ("1", Origin::File(folder.path().join("tidings.toml"))));
        assert_eq!(value("DOMAIN"), ("dotenv", Origin::DotEnv(folder.path().join(".env"))));
        assert_eq!(value("BACKEND_HOST"), ("env", Origin::Environment));
        assert_eq!(value("REDIS_CHANNEL"), ("flag", Origin::Flag));
        assert!(!layers.values.contains_key("RUST_LOG"));
    }

    #[test]
    fn dot_env_is_for_development_only() {
        let folder = folder(&[(".env", "DOMAIN=dotenv")]);
        let layers = Layers::load(
            &Flags::default(),
            &variables(&[("ENVIRONMENT", "production")]),
            Some(folder.path()),
        );
        assert!(layers.unwrap().values.keys().eq([&"ENVIRONMENT"]));
    }

    #[test]
    fn an_unknown_key_is_an_error_that_names_the_nearest_and_an_unknown_variable_a_warning() {
        let folder = folder(&[("tidings.toml", "redis_chanel = 'x'")]);
        let error =
            Layers::load(&Flags::default(), &Variables::new(), Some(folder.path())).unwrap_err().to_string();
        assert!(error.contains("redis_chanel") && error.contains("did you mean `redis_channel`?"), "{error}");
        let layers = Layers::load(
            &Flags::default(),
            &variables(&[("TIDINGS_LISTN", "x"), ("TIDINGS_PUBLISH_TO", "channel")]),
            None,
        );
        let warnings = layers.unwrap().warnings.join("\n");
        assert!(warnings.contains("did you mean `TIDINGS_LISTEN`?"), "{warnings}");
        assert!(!warnings.contains("TIDINGS_PUBLISH_TO"), "{warnings}");
    }

    #[test]
    fn secrets_come_from_files_and_are_masked() {
        let folder = folder(&[("key", "s3cret\n")]);
        let path = folder.path().join("key").to_str().unwrap().to_owned();
        let layers =
            Layers::load(&Flags::default(), &variables(&[("TIDINGS_ADMIN_KEY_FILE", &path)]), None).unwrap();
        assert_eq!(layers.values["TIDINGS_ADMIN_KEY"].text, "s3cret");
        let (_, shown, origin) =
            layers.effective().find(|(setting, ..)| setting.name == "TIDINGS_ADMIN_KEY").unwrap();
        assert_eq!((shown.as_deref(), origin), (Some("********"), Origin::SecretFile(path.into())));
        let missing = Layers::load(&Flags::default(), &variables(&[("REDIS_URL_FILE", "/nowhere/x")]), None)
            .unwrap_err();
        assert!(
            missing.to_string().contains("REDIS_URL_FILE") && missing.to_string().contains("/nowhere/x"),
            "{missing}"
        );
    }

    #[test]
    fn keys_are_tables_of_the_file_or_json_in_a_variable_and_never_both() {
        let text = "[[keys]]\nname = 'web'\nkey = 'fedcba9876543210'\ntypes = ['task.*', 'x']\n";
        let folder = folder(&[("tidings.toml", text)]);
        let load = |pairs: &[(&str, &str)]| {
            let layers = Layers::load(&Flags::default(), &variables(pairs), Some(folder.path()));
            layers.map_err(|error| error.to_string())
        };
        let error = keys::read(&load(&[]).unwrap()).unwrap_err().to_string();
        assert!(error.starts_with("keys[0].types[1] (from ") && error.contains("`word.*`"), "{error}");
        let (_, shown, _) =
            load(&[]).unwrap().effective().find(|(setting, ..)| setting.name == "TIDINGS_KEYS").unwrap();
        assert_eq!(shown.as_deref(), Some("********"));
        let both = load(&[("TIDINGS_KEYS", "[]")]).unwrap_err();
        assert!(
            both.starts_with("TIDINGS_KEYS (from environment): ") && both.contains("in one of the two"),
            "{both}"
        );
        let layers = Layers::load(&Flags::default(), &variables(&[("TIDINGS_KEYS", "[{}]")]), None).unwrap();
        let error = keys::read(&layers).unwrap_err().to_string();
        assert!(error.starts_with("TIDINGS_KEYS: keys[0].name (from environment): "), "{error}");
    }

    #[test]
    fn a_broken_file_is_told_by_its_line_and_without_it() {
        for (text, words) in [
            ("domain = 'x'\nadmin_key = 's3cret\n", "line 2"),
            ("[keys]\nname = 'web'\nkey = 's3cret'", "`[[keys]]`"),
        ] {
            let folder = folder(&[("tidings.toml", text)]);
            let error = Layers::load(&Flags::default(), &Variables::new(), Some(folder.path()));
            let error = error.unwrap_err().to_string();
            assert!(error.contains(words) && !error.contains("s3cret"), "{error}");
        }
    }

    #[test]
    fn groups_are_tables_and_lists_are_lists() {
        let folder = folder(&[(
            "t.toml",
            "allowed_origins = ['https://a.example', 'https://b.example']\n[history]\nevents = 5\n[workspaces]\nw1 = 'p1'",
        )]);
        let flags = Flags { file: Some(folder.path().join("t.toml")), values: Vec::new() };
        let layers = Layers::load(&flags, &Variables::new(), None).unwrap();
        assert_eq!(layers.list("TIDINGS_ALLOWED_ORIGINS"), ["https://a.example", "https://b.example"]);
        assert_eq!(layers.values["TIDINGS_HISTORY_EVENTS"].text, "5");
        assert_eq!(layers.workspaces["w1"], "p1");
    }
}
