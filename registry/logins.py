"""Users and their roles in MLflow's own basic authentication, from inside its server.

Imported only where logins are on: MLflow's module reads its configuration file when it is imported.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from mlflow.exceptions import MlflowException
from mlflow.server import auth, handlers
from mlflow.utils.workspace_utils import DEFAULT_WORKSPACE_NAME

from registry.errors import PromotionRefused, UnknownVersion
from registry.roles import FOR_PEOPLE, PERMISSIONS, SERVICE_PREFIX, SERVICES, Caller, Role, read_roles, role_name

PASSWORD_CHARS_MIN = 12


def open_to_all_users(path: str) -> None:
    """Let every login read one of the guard's own pages, which say by themselves what they show to whom."""
    auth.BEFORE_REQUEST_VALIDATORS[path, "GET"] = lambda: True


class Logins:
    """Users and roles; the caller of each method has been found to be an admin, or is the server itself."""

    def caller(self, name: str) -> Caller:
        """Somebody with the roles they have now.

        Raises:
            UnknownVersion: there is no such user.
        """
        user = self._user(name)
        return Caller(name, self._roles(user), admin=bool(user.is_admin))

    def provide(self, models: Iterable[str], passwords: Mapping[str, str]) -> None:
        """Make what a workspace needs: a model, an experiment and roles for every stream, and the service's own users.

        Idempotent. A service's password that differs from the keys folder's is set to that.

        Args:
            models: registered models of the streams.
            passwords: of the service's own users, by role.
        """
        for role, name in SERVICES.items():
            if role in passwords:
                self._keep_user(name, passwords[role])
        for model in models:
            for role in PERMISSIONS:
                self._role_id(role, model)
            for role, name in SERVICES.items():
                if role in passwords:
                    self._assign(name, role, model)

    def everybody(self) -> list[dict[str, Any]]:
        """All users by name: name, admin, service, and roles by model."""
        found = []
        for user in sorted(auth.store.list_users(), key=lambda user: user.username):
            roles = {model: sorted(names) for model, names in sorted(self._roles(user).items())}
            service = user.username in SERVICES.values()
            found.append({"name": user.username, "admin": bool(user.is_admin), "service": service, "roles": roles})
        return found

    def add(self, name: str, password: str) -> bool:
        """Make a user without any role. False: there is one of that name, who stays as they are.

        Raises:
            PromotionRefused: the name is the service's, or the password is short.
        """
        if name.startswith(SERVICE_PREFIX) or not name.strip() or name != name.strip():
            raise PromotionRefused(f"user {name!r}: names like {SERVICE_PREFIX}... are the service's; choose another")
        if auth.store.has_user(name):
            return False
        if len(password) < PASSWORD_CHARS_MIN:
            raise PromotionRefused(
                f"user {name!r}: password has {len(password)} characters, must have at least {PASSWORD_CHARS_MIN}"
            )
        auth.store.create_user(name, password)
        return True

    def grant(self, name: str, role: str, model: str) -> bool:
        """Give a role. False: they have it.

        Raises:
            PromotionRefused: no such role, or none for this user. UnknownVersion: no such user.
        """
        wanted, user = self._grantable(name, role), self._user(name)
        if wanted is Role.ADMIN:
            if user.is_admin:
                return False
            self._set_admin(name, admin=True)
            return True
        if wanted in self._roles(user).get(model, frozenset()):
            return False
        self._assign(name, wanted, model)
        return True

    def revoke(self, name: str, role: str, model: str) -> bool:
        """Take a role. False: they have it not.

        Raises:
            PromotionRefused: no such role, none for this user, or the last admin. UnknownVersion: no such user.
        """
        wanted, user = self._grantable(name, role), self._user(name)
        if wanted is Role.ADMIN:
            if not user.is_admin:
                return False
            if sum(bool(other.is_admin) for other in auth.store.list_users()) == 1:
                raise PromotionRefused(f"user {name!r} is the only admin; make another one first")
            self._set_admin(name, admin=False)
            return True
        if wanted not in self._roles(user).get(model, frozenset()):
            return False
        auth.store.unassign_role_from_user(user.id, self._role_id(wanted, model))
        return True

    @staticmethod
    def _grantable(name: str, role: str) -> Role:
        if role not in set(FOR_PEOPLE):
            raise PromotionRefused(f"role={role!r}: must be one of {', '.join(FOR_PEOPLE)}")
        if name in SERVICES.values():
            raise PromotionRefused(f"user {name!r} is the service's own and has what it needs; name a person")
        return Role(role)

    @staticmethod
    def _user(name: str) -> Any:
        if not auth.store.has_user(name):
            raise UnknownVersion(f"user {name!r}: there is none; make one by `tidegate users add {name}`")
        return auth.store.get_user(name)

    @staticmethod
    def _roles(user: Any) -> dict[str, frozenset[Role]]:
        return read_roles(role.name for role in auth.store.list_user_roles(user.id))

    @staticmethod
    def _set_admin(name: str, *, admin: bool) -> None:
        auth.store.update_user(name, is_admin=admin)
        auth._invalidate_user_auth_cache(name)  # noqa: SLF001 - MLflow's own routes do the same

    @staticmethod
    def _keep_user(name: str, password: str) -> None:
        if not auth.store.has_user(name):
            auth.store.create_user(name, password)
        elif not auth.store.authenticate_user(name, password):
            auth.store.update_user(name, password=password)

    def _assign(self, name: str, role: Role, model: str) -> None:
        try:
            auth.store.assign_role_to_user(self._user(name).id, self._role_id(role, model))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    @staticmethod
    def _role_id(role: Role, model: str) -> int:
        """A role of a model; made, with its permissions, when it is missing."""
        name = role_name(role, model)
        known = {found.name: found for found in auth.store.list_roles([DEFAULT_WORKSPACE_NAME])}
        made = known.get(name) or auth.store.create_role(name, DEFAULT_WORKSPACE_NAME, "Tidegate's")
        has = {(p.resource_type, p.resource_pattern) for p in auth.store.list_role_permissions(made.id)}
        places = {"model": model, "experiment": _experiment(model), "all": "*"}
        _ensure_model(model)
        for kind, whose, permission in PERMISSIONS[role]:
            if (kind, places[whose]) not in has:
                auth.store.add_role_permission(made.id, kind, places[whose], permission)
        return int(made.id)


def _experiment(model: str) -> str:
    """Id of the experiment that holds a model's runs; made when it is missing."""
    store = handlers._get_tracking_store()  # noqa: SLF001 - there is no public way
    found = store.get_experiment_by_name(model)
    return str(found.experiment_id if found else store.create_experiment(model))


def _ensure_model(model: str) -> None:
    store = handlers._get_model_registry_store()  # noqa: SLF001 - there is no public way
    try:
        store.get_registered_model(model)
    except MlflowException:
        store.create_registered_model(model)
