"""What goes over a bridge of this machine, seen frame by frame, with the tags as they are on the wire."""

import collections
import socket
import struct
import threading

ETH_P_ALL = 3
SOL_PACKET, PACKET_ADD_MEMBERSHIP, PACKET_AUXDATA = 263, 1, 8
PACKET_MR_PROMISC = 1
# The kernel takes the outer tag out of the frame and tells it beside (`packet(7)`).
AUXDATA = struct.Struct("=IIIHHHH")
TP_STATUS_VLAN_VALID = 1 << 4

VLAN, ARP, IPV4 = 0x8100, 0x0806, 0x0800

# `mac`: of the sender. `vid`: None of a frame without a tag. `inner`: the type behind the outer tag. `source`, `target`:
# IPv4, or None.
Frame = collections.namedtuple("Frame", "mac vid inner source target protocol ports")


def parse(frame, vid):
    """A frame from which the outer tag was taken already."""
    mac, inner = frame[6:12].hex(":"), int.from_bytes(frame[12:14], "big")
    if inner != IPV4:
        return Frame(mac, vid, inner, None, None, None, None)
    packet = frame[14:]
    ports = struct.unpack("!HH", packet[20:24]) if packet[9] in (6, 17) and len(packet) >= 24 else None
    return Frame(mac, vid, inner, socket.inet_ntoa(packet[12:16]), socket.inet_ntoa(packet[16:20]), packet[9], ports)


class Capture:
    """The frames that pass a bridge while a `with` block lasts."""

    def __init__(self, bridge):
        self.socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
        self.socket.bind((bridge, 0))
        index = socket.if_nametoindex(bridge)
        promiscuous = struct.pack("=iHH8s", index, PACKET_MR_PROMISC, 0, b"")
        self.socket.setsockopt(SOL_PACKET, PACKET_ADD_MEMBERSHIP, promiscuous)
        self.socket.setsockopt(SOL_PACKET, PACKET_AUXDATA, 1)
        self.socket.settimeout(0.2)
        self.frames = []
        self.ended = False
        self.thread = threading.Thread(target=self.read)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.ended = True
        self.thread.join()
        self.socket.close()

    def read(self):
        while not self.ended:
            try:
                frame, beside, _, _ = self.socket.recvmsg(65536, 256)
            except TimeoutError:
                continue
            vid = None
            for level, kind, data in beside:
                if (level, kind) == (SOL_PACKET, PACKET_AUXDATA):
                    status, _, _, _, _, tci, _ = AUXDATA.unpack(data[:AUXDATA.size])
                    vid = tci & 0xfff if status & TP_STATUS_VLAN_VALID else None
            if vid is None and frame[12:14] == VLAN.to_bytes(2, "big"):
                vid = int.from_bytes(frame[14:16], "big") & 0xfff
                frame = frame[:12] + frame[16:]
            self.frames.append(parse(frame, vid))

    def macs(self, source, target):
        """The senders of the frames with IPv4 packets from one address to another."""
        return {frame.mac for frame in self.frames if (frame.source, frame.target) == (source, target)}

    def vids(self, source, target):
        """The VIDs of the IPv4 packets from one address to another."""
        return {frame.vid for frame in self.frames if (frame.source, frame.target) == (source, target)}
