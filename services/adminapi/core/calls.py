"""The one table of Admin API calls: names, sockets, rules, and who answers.

Owns every method name of the three sockets. Must not know how a call is answered.
Invariant: a name is on exactly one socket, a parametrised name is written out for
each value of its parameter, and no other module decides which calls exist.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

QUBE_CLASSES = ("AdminVM", "AppVM", "DispVM", "RemoteVM", "StandaloneVM", "TemplateVM")
# Device classes that this system serves; block and pci come with the core.
DEVICE_CLASSES = ("block", "pci")


@dataclass(frozen=True, slots=True)
class Call:
    """One row.

    socket: "admin", "internal", "misc", or "exec" for what an executable in
    /etc/qubes-rpc answers and no socket does. dest: "0" the AdminVM, "V" any other,
    "*" any. arg and payload: "-" forbidden, "!" required, "?" optional. effect: "ro"
    or "rwx"; scope: "global", "local" or "" (no policy). handler: the name under which
    a read or an action answers; "" = refused as not implemented. param: what the
    parametrised part of the name stands for ("" where there is none).
    """

    name: str
    socket: str
    dest: str
    arg: str
    payload: str
    effect: str
    scope: str
    handler: str
    param: str = ""

    @property
    def stream(self) -> bool:
        """The reply is a stream of events instead of one message."""
        return self.handler in (
            "events", "events_resumable", "stats", "op_watch", "import_hold",
        )  # fmt: skip


# name  socket  dest  arg  payload  effect  scope  handler; {class} and {device} are written out
_ROWS = """
admin.vmclass.List                       admin 0 - - ro  global vmclass_list
admin.deviceclass.List                   admin 0 - - ro  global deviceclass_list
admin.vm.List                            admin * - - ro  global vm_list
admin.vm.CurrentState                    admin * - - ro  local  current_state

admin.vm.property.List                   admin * - - ro  local  property_list
admin.vm.property.Get                    admin * ! - ro  local  property_get
admin.vm.property.GetAll                 admin * - - ro  local  property_get_all
admin.vm.property.GetDefault             admin * ! - ro  local  property_get_default
admin.vm.property.Help                   admin * ! - ro  local  property_help
admin.vm.property.Set                    admin * ! ? rwx local  property_set
admin.vm.property.Reset                  admin * ! - rwx local  property_reset
admin.property.List                      admin 0 - - ro  global system_property_list
admin.property.Get                       admin 0 ! - ro  global system_property_get
admin.property.GetAll                    admin 0 - - ro  global system_property_get_all
admin.property.GetDefault                admin 0 ! - ro  global system_property_get_default
admin.property.Help                      admin 0 ! - ro  global system_property_help
admin.property.Set                       admin 0 ! ? rwx global system_property_set
admin.property.Reset                     admin 0 ! - rwx global system_property_reset

admin.vm.feature.List                    admin * - - ro  local  feature_list
admin.vm.feature.Get                     admin * ! - ro  local  feature_get
admin.vm.feature.CheckWithTemplate       admin * ! - ro  local  feature_check_template
admin.vm.feature.CheckWithNetvm          admin * ! - ro  local  feature_check_netvm
admin.vm.feature.CheckWithAdminVM        admin * ! - ro  local  feature_check_adminvm
admin.vm.feature.CheckWithTemplateAndAdminVM admin * ! - ro local feature_check_template_adminvm
admin.vm.feature.Set                     admin * ! ? rwx local  feature_set
admin.vm.feature.Remove                  admin * ! - rwx local  feature_remove

admin.vm.tag.List                        admin * - - ro  local  tag_list
admin.vm.tag.Get                         admin * ! - ro  local  tag_get
admin.vm.tag.Set                         admin * ! - rwx local  tag_set
admin.vm.tag.Remove                      admin * ! - rwx local  tag_remove

admin.label.List                         admin 0 - - ro  global label_list
admin.label.Get                          admin 0 ! - ro  global label_get
admin.label.Index                        admin 0 ! - ro  global label_index
admin.label.Create                       admin 0 ! ! rwx global label_create
admin.label.Remove                       admin 0 ! - rwx global label_remove

admin.vm.Start                           admin * - - rwx local  start
admin.vm.Shutdown                        admin * ? - rwx local  shutdown
admin.vm.Kill                            admin * - - rwx local  kill
admin.vm.Pause                           admin * - - rwx local  pause
admin.vm.Unpause                         admin * - - rwx local  unpause
admin.vm.Suspend                         admin * - - rwx local  suspend
admin.vm.Resume                          admin * - - rwx local  resume

admin.vm.Create.{class}                  admin 0 ? ? rwx global create
admin.vm.CreateInPool.{class}            admin 0 ? ? rwx global create_in_pool
admin.vm.CreateDisposable                admin * ? ? rwx global create_disposable
admin.vm.Remove                          admin * - - rwx global remove

admin.vm.volume.List                     admin * - - ro  local  volume_list
admin.vm.volume.Info                     admin * ! - ro  local  volume_info
admin.vm.volume.ListSnapshots            admin * ! - ro  local  volume_list_snapshots
admin.vm.volume.Revert                   admin * ! ! rwx local  volume_revert
admin.vm.volume.Resize                   admin * ! ! rwx local  volume_resize
admin.vm.volume.Clear                    admin * ! - rwx local  volume_clear
admin.vm.volume.Set.revisions_to_keep    admin * ! ! rwx local  volume_set_revisions_to_keep
admin.vm.volume.Set.rw                   admin * ! ! rwx local  volume_set_rw
admin.vm.volume.Set.ephemeral            admin * ! ! rwx local  volume_set_ephemeral
admin.vm.volume.CloneFrom                admin * ! - rwx local  volume_clone_from
admin.vm.volume.CloneTo                  admin * ! ! rwx local  volume_clone_to
admin.vm.volume.Import                   exec  * ! ? rwx local  -
admin.vm.volume.ImportWithSize           exec  * ! ? rwx local  -

admin.pool.List                          admin 0 - - ro  global pool_list
admin.pool.ListDrivers                   admin 0 - - ro  global pool_list_drivers
admin.pool.Info                          admin 0 ! - ro  global pool_info
admin.pool.UsageDetails                  admin 0 ! - ro  global pool_usage_details
admin.pool.Add                           admin 0 ! ! rwx global pool_add
admin.pool.Remove                        admin 0 ! - rwx global pool_remove
admin.pool.Set.revisions_to_keep         admin 0 ! ! rwx global pool_set_revisions_to_keep
admin.pool.Set.ephemeral_volatile        admin 0 ! ! rwx global pool_set_ephemeral_volatile
admin.pool.volume.List                   admin 0 ! - ro  global pool_volume_list

admin.vm.device.{device}.Available       admin * ? - ro  local  device_available
admin.vm.device.{device}.Assigned        admin * ? - ro  local  device_assigned
admin.vm.device.{device}.Attached        admin * ? - ro  local  device_attached
admin.vm.device.{device}.Assign          admin * ! ! rwx local  device_assign
admin.vm.device.{device}.Unassign        admin * ! - rwx local  device_unassign
admin.vm.device.{device}.Attach          admin * ! ? rwx local  device_attach
admin.vm.device.{device}.Detach          admin * ! - rwx local  device_detach
admin.vm.device.{device}.Set.assignment  admin * ! ! rwx local  device_set_assignment
admin.vm.device.denied.List              admin * - - ro  local  denied_list
admin.vm.device.denied.Add               admin * - ? rwx local  denied_add
admin.vm.device.denied.Remove            admin * - ? rwx local  denied_remove

admin.vm.firewall.Get                    admin V - - ro  local  firewall_get
admin.vm.firewall.Set                    admin V - ! rwx local  firewall_set
admin.vm.firewall.Reload                 admin V - - rwx local  firewall_reload

admin.vm.notes.Get                       admin V - - ro  local  notes_get
admin.vm.notes.Set                       admin V - ? rwx local  notes_set

admin.backup.Info                        admin 0 ! - ro  local  backup_info
admin.backup.Execute                     admin 0 ! - rwx global backup_execute
admin.backup.Cancel                      admin 0 ! - rwx global backup_cancel

admin.Events                             admin * - - ro  global events
admin.vm.Stats                           admin * - - ro  global stats
admin.vm.Console                         admin * - - rwx local  console

internal.GetSystemInfo                   internal 0 - - ro  - get_system_info
internal.vm.volume.ImportBegin           internal * ! ? rwx - import_begin
internal.vm.volume.ImportEnd             internal * ! ! rwx - import_end
bulkhead.vm.volume.ImportHold            internal * ! - rwx - import_hold
internal.SuspendPre                      internal 0 - - rwx - suspend_pre
internal.SuspendPost                     internal 0 - - rwx - suspend_post

qubes.FeaturesRequest                    misc 0 - - rwx - features_request
qubes.NotifyTools                        misc 0 - - rwx - notify_tools
qubes.NotifyUpdates                      misc 0 - ! rwx - notify_updates

bulkhead.vm.Clone                        admin V - ! rwx global clone
bulkhead.Events                          admin * ? - ro  global events_resumable
bulkhead.op.List                         admin * - - ro  global op_list
bulkhead.op.Get                          admin 0 ! - ro  global op_get
bulkhead.op.Cancel                       admin 0 ! - rwx global op_cancel
bulkhead.op.Watch                        admin * ? - ro  global op_watch
bulkhead.kernel.List                     admin 0 - - ro  global kernel_list
bulkhead.kernel.Add                      admin 0 ! ! rwx global kernel_add
bulkhead.kernel.Remove                   admin 0 ! - rwx global kernel_remove
bulkhead.vm.firewall.Effective           admin V - - ro  local  firewall_effective
bulkhead.vm.GetAll                       admin * - - ro  global vm_get_all
bulkhead.caller.Open                     admin V - - rwx -      caller_open
bulkhead.caller.Close                    admin V - - rwx -      caller_close
bulkhead.caller.List                     admin 0 - - ro  -      caller_list
"""

# Names that 4.4 installs or documents without any handler behind them; asking for one
# gives the same answer as any unknown name.
NEVER_SERVED = (
    "admin.property.HelpRst",
    "admin.vm.property.HelpRst",
    "admin.vm.firewall.Flush",
    "admin.vm.firewall.GetPolicy",
    "admin.vm.firewall.SetPolicy",
    "admin.pool.volume.Info",
    "admin.pool.volume.Set.revisions_to_keep",
    "admin.pool.volume.ListSnapshots",
    "admin.pool.volume.Snapshot",
    "admin.pool.volume.Revert",
    "admin.pool.volume.Resize",
    "admin.pool.volume.Import",
    "admin.pool.volume.CloneFrom",
    "admin.pool.volume.CloneTo",
    "admin.vm.volume.Snapshot",
    "admin.vm.Killed",
)

_PARAMETERS: Mapping[str, tuple[str, ...]] = {
    "{class}": QUBE_CLASSES,
    "{device}": DEVICE_CLASSES,
}


def _rows() -> Iterator[Call]:
    for line in _ROWS.splitlines():
        if not line.strip():
            continue
        name, socket, dest, arg, payload, effect, scope, handler = line.split()
        scope = "" if scope == "-" else scope
        handler = "" if handler == "-" else handler
        for mark, values in _PARAMETERS.items():
            if mark in name:
                for value in values:
                    yield Call(
                        name.replace(mark, value),
                        *(socket, dest, arg, payload, effect, scope, handler, value),
                    )
                break
        else:
            yield Call(name, socket, dest, arg, payload, effect, scope, handler)


def _table() -> dict[str, dict[str, Call]]:
    table: dict[str, dict[str, Call]] = {"admin": {}, "internal": {}, "misc": {}, "exec": {}}
    seen: set[str] = set()
    for row in _rows():
        if row.name in seen:
            raise KeyError(f"call {row.name} is declared twice")
        seen.add(row.name)
        table[row.socket][row.name] = row
    return table


CALLS: Mapping[str, Mapping[str, Call]] = _table()


def all_calls() -> Iterator[Call]:
    """Every row of every socket."""
    for rows in CALLS.values():
        yield from rows.values()


def find(socket: str, method: str) -> Call | None:
    """The row that answers `method` on `socket`, or None: no such method there."""
    return CALLS[socket].get(method)
