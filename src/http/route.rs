//! A policy for each route.

use crate::{
    error::ConfigError,
    policy::{Admit, Gate, Never, Policy, Readiness, Reading, select},
    rejected::Rejected,
};
use http::{Method, Request};
use std::{collections::HashMap, fmt, sync::Arc, task::Context};

/// One layer for a whole app that picks the policy by method and route, with a default and exemptions.
///
/// A route is a template in axum's syntax, which is [`matchit`]'s: `/users/{id}`, `/files/{*path}`; of a gRPC service
/// `/shop.Orders/Place` or `/shop.Orders/{method}`. The path itself is never a key nor a label.
///
/// With the feature `axum`, and in a layer that axum runs after routing (`Router::layer`, `route_layer`), the route is the one that
/// axum has matched; where that one ends in a catch-all, the path tells more and is matched as a whole, so a rule may be finer
/// than axum's route: for one method of a tonic service. Anywhere else (round a finished app, inside `nest_service`, in tonic and hyper) it is the one that
/// the path matches, as it stands in the request: nothing is decoded and no slash is added or taken away. What matches no route
/// meets the default, so an odd spelling of an exempt path is not exempt. Inside `nest_service` the path is what is left of it;
/// inside `nest` the route is the whole template, with the prefix: `/api/users/{id}`. A request that a handler passes on to a client
/// still has the route that it came in by: take `MatchedPath` out of its extensions.
///
/// `HEAD` takes the policy of `GET` where it has none of its own. All policies are of one type: limits, breakers, pairs, keyed
/// ones. The policy is known only when the request is: such a layer reserves nothing in `poll_ready`, so it asks the inner
/// service to be ready before it rejects.
///
/// ```
/// use axum::{Router, routing::get};
/// use http::Method;
/// use portcullis::{PerRoute, RateLimitLayer, RateLimiter, TokenBucket};
/// use std::time::Duration;
///
/// let limit = |name, n| RateLimiter::builder("api", TokenBucket::new(n, Duration::from_secs(60))).limit(name).build();
/// let limits = PerRoute::builder()
///     .route(Method::GET, "/users/{id}", limit("users", 100)?)
///     .any("/search", limit("search", 10)?)
///     .exempt("/health")
///     .default(limit("other", 1_000)?)
///     .build()?;
/// let app: Router = Router::new()
///     .route("/users/{id}", get(async || "a user"))
///     .layer(RateLimitLayer::http(limits));
/// # Ok::<(), portcullis::ConfigError>(())
/// ```
///
/// A look-up takes time in proportion to the length of the path; it allocates nothing but where a template has parameters that
/// `matchit` keeps elsewhere than on the stack (more than four), and where a nested route of axum's catches all.
#[must_use = "a policy guards nothing until it is put into a layer"]
pub struct PerRoute<P>(Arc<Routes<P>>);

struct Routes<P> {
    by_path: matchit::Router<usize>,
    by_template: HashMap<String, usize>,
    rules: Vec<Rules<P>>,
    default: Option<P>,
}

/// The rules of one template.
struct Rules<P> {
    by_method: Vec<(Method, Rule<P>)>,
    any: Option<Rule<P>>,
}

enum Rule<P> {
    Ask(P),
    Exempt,
}

/// Makes a [`PerRoute`]; from [`PerRoute::builder`].
///
/// ```
/// # use portcullis::{CircuitBreaker, PerRoute};
/// let orders = CircuitBreaker::builder("orders").build()?;
/// let routes = PerRoute::builder().any("/shop.Orders/{method}", orders).build()?;
/// # Ok::<(), portcullis::ConfigError>(())
/// ```
#[must_use = "a builder does nothing until `build`"]
pub struct PerRouteBuilder<P> {
    rules: Vec<(Option<Method>, String, Rule<P>)>,
    default: Option<P>,
}

impl<P> PerRouteBuilder<P> {
    /// The policy of one method of a route.
    pub fn route(mut self, method: Method, template: impl Into<String>, policy: P) -> Self {
        self.rules.push((Some(method), template.into(), Rule::Ask(policy)));
        self
    }

    /// The policy of a route, for the methods that have none of their own.
    pub fn any(mut self, template: impl Into<String>, policy: P) -> Self {
        self.rules.push((None, template.into(), Rule::Ask(policy)));
        self
    }

    /// Admits a route's requests unasked, for the methods that have no policy of their own. What is beside these routes in a pair, or
    /// in another layer, is asked all the same: to exempt a route from several policies, have pairs as the policies of routes.
    ///
    /// ```
    /// use portcullis::{KeyedRateLimiter, PerRoute, RateLimitLayer, RateLimiter, TokenBucket, key};
    /// use std::time::Duration;
    ///
    /// let all = RateLimiter::new("api", TokenBucket::new(1_000, Duration::from_secs(60)))?;
    /// let callers = KeyedRateLimiter::builder("api", TokenBucket::new(10, Duration::from_secs(60))).limit("caller").build()?;
    /// let both = (all, callers.by(key::header("x-api-key")?));
    /// let layer = RateLimitLayer::http(PerRoute::builder().exempt("/health").default(both).build()?);
    /// # Ok::<(), portcullis::ConfigError>(())
    /// ```
    pub fn exempt(mut self, template: impl Into<String>) -> Self {
        self.rules.push((None, template.into(), Rule::Exempt));
        self
    }

    /// The policy of all other requests. Without one they are admitted.
    pub fn default(mut self, policy: P) -> Self {
        self.default = Some(policy);
        self
    }

    /// The routes, ready.
    ///
    /// # Errors
    ///
    /// A template that does not begin with a slash, is not well-formed or has more than 25 parameters, two that match the same paths
    /// under different names, and two rules for the same method of one route.
    pub fn build(self) -> Result<PerRoute<P>, ConfigError> {
        let mut routes = Routes {
            by_path: matchit::Router::new(),
            by_template: HashMap::new(),
            rules: Vec::new(),
            default: self.default,
        };
        for (method, template, rule) in self.rules {
            let refused = |expected: String| ConfigError::new("template", format!("{template:?}"), expected);
            if !template.starts_with('/') {
                return Err(refused("a path that begins with a slash".into()));
            }
            if parameters(&template) > MOST_PARAMETERS {
                return Err(refused(format!("a template of at most {MOST_PARAMETERS} parameters")));
            }
            let known = routes.by_template.get(&template).copied();
            let at = known.unwrap_or(routes.rules.len());
            if known.is_none() {
                let inserted = routes.by_path.insert(&template, at);
                inserted.map_err(|error| {
                    refused(format!("a template like /users/{{id}} that no other overlaps: {error}"))
                })?;
                routes.by_template.insert(template.clone(), at);
                routes.rules.push(Rules {
                    by_method: Vec::new(),
                    any: None,
                });
            }
            let rules = &mut routes.rules[at];
            match method {
                None if rules.any.is_some() => return Err(refused("one rule for any method".into())),
                None => rules.any = Some(rule),
                Some(method) if rules.by_method.iter().any(|(of, _)| *of == method) => {
                    return Err(refused(format!("one rule for {method}")));
                }
                Some(method) => rules.by_method.push((method, rule)),
            }
        }
        Ok(PerRoute(Arc::new(routes)))
    }
}

/// `matchit` gives each a letter, and panics where there is none left for the next.
const MOST_PARAMETERS: usize = 25;

/// How many parameters a template has; two braces are one that is meant as such.
fn parameters(template: &str) -> usize {
    template.replace("{{", "").matches('{').count()
}

impl<P> Rules<P> {
    fn of(&self, method: &Method) -> Option<&Rule<P>> {
        let named = |method: &Method| self.by_method.iter().find(|(of, _)| of == method);
        let head = || {
            if *method == Method::HEAD {
                named(&Method::GET)
            } else {
                None
            }
        };
        named(method).or_else(head).map(|(_, rule)| rule).or(self.any.as_ref())
    }
}

impl<P> PerRoute<P> {
    /// Starts without routes.
    pub fn builder() -> PerRouteBuilder<P> {
        PerRouteBuilder {
            rules: Vec::new(),
            default: None,
        }
    }

    fn pick<B>(&self, request: &Request<B>) -> Option<&P> {
        let routes = &*self.0;
        let by_path = |path: &str| routes.by_path.at(path).ok().map(|found| *found.value);
        let at = match matched(request) {
            Some(template) if catches_all(template) => match nested(request) {
                // A parameter of the prefix is matched as if it were a part of a path.
                Some(prefix) => by_path(&[prefix.trim_end_matches('/'), request.uri().path()].concat()),
                None => by_path(request.uri().path()),
            },
            // A template of other parameters' names is matched as if it were a path: a parameter matches a parameter.
            Some(template) => {
                let same = routes.by_template.get(template).copied();
                same.or_else(|| by_path(template))
            }
            None => by_path(request.uri().path()),
        };
        match at.and_then(|at| routes.rules[at].of(request.method())) {
            Some(Rule::Ask(policy)) => Some(policy),
            Some(Rule::Exempt) => None,
            None => routes.default.as_ref(),
        }
    }
}

/// The template that axum has matched.
#[cfg(feature = "axum")]
fn matched<B>(request: &Request<B>) -> Option<&str> {
    let path: &axum::extract::MatchedPath = request.extensions().get()?;
    Some(path.as_str())
}

#[cfg(not(feature = "axum"))]
fn matched<B>(_: &Request<B>) -> Option<&str> {
    None
}

fn catches_all(template: &str) -> bool {
    template.rsplit('/').next().is_some_and(|last| last.starts_with("{*"))
}

/// The prefix that axum has taken off the path.
#[cfg(feature = "axum")]
fn nested<B>(request: &Request<B>) -> Option<&str> {
    let prefix: &axum::extract::NestedPath = request.extensions().get()?;
    Some(prefix.as_str())
}

#[cfg(not(feature = "axum"))]
fn nested<B>(_: &Request<B>) -> Option<&str> {
    None
}

impl<P> Clone for PerRoute<P> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<P> fmt::Debug for PerRoute<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut templates: Vec<_> = self.0.by_template.keys().collect();
        templates.sort_unstable();
        f.debug_struct("PerRoute")
            .field("templates", &templates)
            .finish_non_exhaustive()
    }
}

impl<P> fmt::Debug for PerRouteBuilder<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let templates: Vec<_> = self.rules.iter().map(|(_, template, _)| template).collect();
        f.debug_struct("PerRouteBuilder")
            .field("templates", &templates)
            .finish_non_exhaustive()
    }
}

impl<P> Gate for PerRoute<P> {
    type Reserved = ();

    fn reserve(&self, _: Option<()>, _: &Reading, _: &mut Context<'_>) -> Readiness<()> {
        Readiness::Ready(())
    }
}

impl<P, B> Policy<Request<B>> for PerRoute<P>
where
    P: Policy<Request<B>, Wait = Never<<P as Policy<Request<B>>>::Permit>>,
{
    type Permit = Option<P::Permit>;
    type Wait = Never<Self::Permit>;

    fn refusal(&self, (): &(), request: &Request<B>, now: &Reading) -> Option<Rejected> {
        select::refusal(self.pick(request)?, request, now)
    }

    fn refuse(&self, (): &(), request: &Request<B>, now: &Reading) -> Option<Rejected> {
        select::refuse(self.pick(request)?, request, now)
    }

    fn admit(&self, (): (), request: &Request<B>, now: &Reading) -> Admit<Self::Permit, Self::Wait> {
        select::admit(self.pick(request), request, now)
    }
}
