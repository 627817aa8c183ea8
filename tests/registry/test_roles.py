from registry.roles import PERMISSIONS, SERVICES, Caller, Role, read_roles, role_name


def test_a_role_is_read_back_from_its_name_in_mlflow_whatever_the_model_is_called():
    names = [role_name(Role.APPROVER, "desk"), role_name(Role.VIEWER, "a:b, c"), role_name(Role.TRAINER, "desk")]
    assert read_roles(names) == {
        "desk": frozenset({Role.APPROVER, Role.TRAINER}),
        "a:b, c": frozenset({Role.VIEWER}),
    }


def test_roles_that_are_not_ours_say_nothing():
    assert read_roles(["__user_3__", "approver:desk", "tidegate:king:desk", "tidegate:approver:", "tidegate"]) == {}


def test_an_admin_is_everything_but_the_service_itself():
    admin = Caller("root", admin=True)
    assert admin.has("desk", Role.APPROVER)
    assert admin.has("desk", Role.SERVER, Role.ADMIN)
    assert not admin.has("desk", Role.SERVER)
    assert not admin.has("desk", Role.LEARNER)


def test_a_role_is_for_one_model():
    ada = Caller("ada", {"desk": frozenset({Role.APPROVER})})
    assert ada.has("desk", Role.APPROVER)
    assert not ada.has("other", Role.APPROVER)
    assert ada.has_anywhere(Role.APPROVER)
    assert not ada.has_anywhere(Role.TRAINER, Role.ADMIN)


def test_no_role_may_manage_a_model_or_an_experiment_and_so_give_rights_to_others():
    given = {(kind, permission) for rights in PERMISSIONS.values() for kind, _, permission in rights}
    assert ("registered_model", "MANAGE") not in given
    assert ("experiment", "MANAGE") not in given
    assert set(SERVICES) < set(PERMISSIONS)
