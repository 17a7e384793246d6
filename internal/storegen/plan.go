package storegen

import (
	"fmt"
	"math"
	"math/bits"
	"strings"
	"time"

	"github.com/holdfast-backup/holdfast/internal/ocis"
)

// rng is splitmix64: a few instructions a number, and any number can be a state, so every thing has
// a stream of its own that does not depend on the order in which things are made.
type rng uint64

func (r *rng) next() uint64 {
	*r += 0x9e3779b97f4a7c15
	z := uint64(*r)
	z = (z ^ z>>30) * 0xbf58476d1ce4e5b9
	z = (z ^ z>>27) * 0x94d049bb133111eb
	return z ^ z>>31
}

func (r *rng) below(n int) int {
	hi, _ := bits.Mul64(r.next(), uint64(n))
	return int(hi)
}

func (r *rng) float() float64 { return float64(r.next()>>11) / (1 << 53) }

// normal draws from the standard normal distribution.
func (r *rng) normal() float64 {
	return math.Sqrt(-2*math.Log(1-r.float())) * math.Cos(2*math.Pi*r.float())
}

// What a stream of numbers is for.
const (
	forSpace = iota + 1
	forFolder
	forFile
	forNodeID
	forBlobID
	forContent
	forUser
	forName
	forSystem
	forMutation
)

// stream is the stream of numbers of one thing.
func stream(seed uint64, what, a, b int) rng {
	r := rng(seed ^ 0x5851f42d4c957f2d)
	for _, x := range [...]int{what, a, b} {
		r = rng(r.next() ^ uint64(x)*0xd6e8feb86659fd93)
	}
	return rng(r.next())
}

func uuid(seed uint64, what, a, b int) string {
	r := stream(seed, what, a, b)
	hi, lo := r.next(), r.next()
	var out [36]byte
	const hexDigits = "0123456789abcdef"
	hi = hi&^0xf000 | 0x4000
	lo = lo&^(3<<62) | 2<<62
	at := 0
	for i := range 32 {
		if i == 8 || i == 12 || i == 16 || i == 20 {
			out[at] = '-'
			at++
		}
		v := hi
		if i >= 16 {
			v = lo
		}
		out[at] = hexDigits[v>>(60-4*(i%16))&15]
		at++
	}
	return string(out[:])
}

// plan is what is made, in numbers; names and ids are drawn when they are needed, so that a million
// files take little memory.
type plan struct {
	o      Options
	users  []user
	spaces []*space
	items  []item // contents, by the files' first
	mount  string // mount id of the user storage
	system string // id of the system user
	admin  string
}

type user struct{ id, login, name string }

type space struct {
	index    int
	id       string
	name     string
	alias    string
	kind     string // personal, project
	owner    string
	members  []int // users, projects only
	disabled bool
	folders  []folder // the root is the first
	files    []file
}

type folder struct {
	parent  int32 // always before its children
	depth   int32
	trashed int64 // time of the deletion, ns since 1970; 0 if it is not in the trash
	made    int64
	changed int64 // tmtime
	size    int64 // treesize
	shared  bool
	leaf    bool
}

type file struct {
	folder   int32
	first    int32 // item of the current content; the older ones follow
	contents int32 // 0 for an empty file
	trashed  int64
	received int64 // when the server got the current content
	inFlight bool  // the blob is still in uploads/
}

// item is one content.
type item struct {
	size int64
	key  uint64 // equal keys give equal contents
	kind contentKind
}

type contentKind uint8

const (
	dense contentKind = iota // cannot be compressed, as photos, films and archives
	prose                    // can
)

var (
	firstDay = time.Date(2022, 1, 3, 6, 0, 0, 0, time.UTC).UnixNano()
	lastDay  = time.Date(2026, 5, 29, 18, 0, 0, 0, time.UTC).UnixNano()
)

const day = int64(24 * time.Hour)

func newPlan(o Options) *plan {
	p := &plan{o: o, mount: uuid(o.Seed, forSystem, 1, 0), system: uuid(o.Seed, forSystem, 2, 0)}
	personal := max(1, (2*o.Spaces+2)/3)
	for i := range personal {
		first, last := givenNames[i%len(givenNames)], familyNames[(i/len(givenNames)+i)%len(familyNames)]
		u := user{id: uuid(o.Seed, forUser, i, 0), login: strings.ToLower(first), name: first + " " + last}
		if i >= len(givenNames) {
			u.login = fmt.Sprintf("%s%d", u.login, i)
			u.name = fmt.Sprintf("%s %d", u.name, i)
		}
		p.users = append(p.users, u)
	}
	p.admin = p.users[0].id
	for i := range o.Spaces {
		p.spaces = append(p.spaces, p.newSpace(i, personal))
	}
	for i, n := range p.share(o.Files) {
		p.fillSpace(p.spaces[i], n)
	}
	p.scale()
	for _, s := range p.spaces {
		p.propagate(s)
	}
	return p
}

func (p *plan) newSpace(i, personal int) *space {
	if i < personal {
		u := p.users[i]
		return &space{index: i, id: u.id, name: u.name, alias: "personal/" + u.login, kind: "personal", owner: u.id}
	}
	r := stream(p.o.Seed, forSpace, i, 0)
	n := i - personal
	name := fmt.Sprintf("%s %d", projectNames[n%len(projectNames)], n+1)
	s := &space{index: i, id: uuid(p.o.Seed, forSpace, i, 1), name: name, kind: "project"}
	s.alias = "project/" + strings.ToLower(strings.ReplaceAll(name, " ", "-"))
	s.owner = s.id
	s.disabled = n%8 == 3
	for range 1 + r.below(4) {
		u := r.below(len(p.users))
		known := false
		for _, have := range s.members {
			known = known || have == u
		}
		if !known {
			s.members = append(s.members, u)
		}
	}
	return s
}

// share deals the files to the spaces unevenly: a few hold much, many hold little.
func (p *plan) share(files int) []int {
	weights, sum := make([]float64, len(p.spaces)), 0.0
	for i := range p.spaces {
		r := stream(p.o.Seed, forSpace, i, 2)
		weights[i] = math.Exp(0.8 * r.normal())
		sum += weights[i]
	}
	counts, left := make([]int, len(weights)), files
	for i, w := range weights {
		counts[i] = min(left, int(float64(files)*w/sum))
		left -= counts[i]
	}
	for i := 0; left > 0; i = (i + 1) % len(counts) {
		counts[i]++
		left--
	}
	return counts
}

func (p *plan) fillSpace(s *space, files int) {
	o := &p.o
	s.folders = append(s.folders, folder{parent: -1, made: firstDay, leaf: true})
	// Nine files to a folder on average, as many instances have it.
	for i := 1; i <= files/9; i++ {
		r := stream(o.Seed, forFolder, s.index, i)
		up := 0
		if r.float() > 0.15 {
			up = r.below(i)
		}
		for s.folders[up].depth >= 9 {
			up = int(s.folders[up].parent)
		}
		s.folders[up].leaf = false
		made := max(s.folders[up].made, firstDay+int64(r.float()*float64(lastDay-firstDay)/4))
		s.folders = append(s.folders, folder{
			parent: int32(up), depth: s.folders[up].depth + 1, made: made, leaf: true,
			shared: r.float() < 0.02 || i == 1 && s.index == 0,
		})
	}
	for i := 1; i < len(s.folders); i++ {
		f := &s.folders[i]
		r := stream(o.Seed, forFolder, s.index, -i)
		if f.leaf && !f.shared && r.float() < o.Trash/2 {
			f.trashed = lastDay - int64(r.float()*float64(30*day))
		}
	}
	for i := range files {
		r := stream(o.Seed, forFile, s.index, i)
		// The square favours the first folders, so that some are large.
		x := r.float()
		fl := int(x * math.Sqrt(x) * float64(len(s.folders)))
		dir := &s.folders[fl]
		f := file{folder: int32(fl), first: int32(len(p.items))}
		f.received = dir.made + int64(r.float()*float64(lastDay-31*day-dir.made))
		if r.float() >= o.Empty {
			f.contents = 1
			if r.float() < o.Revisions {
				f.contents += int32(1 + r.below(3)*r.below(2))
			}
		}
		if dir.trashed == 0 && r.float() < o.Trash/2 {
			f.trashed = lastDay - int64(r.float()*float64(30*day))
		}
		for range f.contents {
			p.items = append(p.items, p.newItem(&r))
		}
		s.files = append(s.files, f)
	}
	// One upload that a server was just about to finish.
	if s.index == 0 && !o.Even {
		for i := range s.files {
			f := &s.files[i]
			if f.contents == 1 && f.trashed == 0 && s.folders[f.folder].trashed == 0 {
				f.inFlight = true
				break
			}
		}
	}
}

// newItem draws a content; its size is in proportion only, until scale.
func (p *plan) newItem(r *rng) item {
	if p.o.Even {
		return item{key: r.next(), kind: dense, size: 1 << 20}
	}
	if r.float() < 0.1 && len(p.items) > 0 {
		return p.items[r.below(len(p.items))]
	}
	it := item{key: r.next(), kind: dense}
	// A third of these is 30 % of all, since a tenth are copies.
	if r.float() < 1.0/3 {
		it.kind = prose
	}
	var median, sigma float64 // bytes
	switch x := r.float(); {
	case x < 0.22: // notes
		median, sigma = 3e3, 1.2
	case x < 0.62: // documents
		median, sigma = 40e3, 1.4
	case x < 0.992: // photos
		median, sigma = 2.5e6, 0.7
	default: // films
		median, sigma = 80e6, 0.9
	}
	it.size = 1 + int64(min(2e9, median*math.Exp(sigma*r.normal())))
	return it
}

// scale brings the sum of the sizes to what was asked for.
func (p *plan) scale() {
	var sum int64
	for _, it := range p.items {
		sum += it.size
	}
	if sum == 0 {
		return
	}
	factor := float64(p.o.Bytes) / float64(sum)
	left := p.o.Bytes
	biggest := 0
	for i := range p.items {
		p.items[i].size = max(1, int64(float64(p.items[i].size)*factor))
		left -= p.items[i].size
		if p.items[i].size > p.items[biggest].size {
			biggest = i
		}
	}
	if left > 0 {
		p.items[biggest].size += left
	}
	for i := 0; left < 0 && i < len(p.items); i++ {
		take := min(-left, p.items[i].size-1)
		p.items[i].size -= take
		left += take
	}
}

// propagate sums sizes and times up to the root, as a server does with every change.
func (p *plan) propagate(s *space) {
	for i := range s.folders {
		s.folders[i].changed = s.folders[i].made
	}
	for i := range s.files {
		f := &s.files[i]
		dir := &s.folders[f.folder]
		dir.changed = max(dir.changed, f.received, f.trashed)
		if f.trashed == 0 {
			dir.size += p.size(f)
		}
	}
	for i := len(s.folders) - 1; i > 0; i-- {
		f := &s.folders[i]
		up := &s.folders[f.parent]
		up.changed = max(up.changed, f.changed, f.trashed)
		if f.trashed == 0 {
			up.size += f.size
		}
	}
}

func (p *plan) size(f *file) int64 {
	if f.contents == 0 {
		return 0
	}
	return p.items[f.first].size
}

func (p *plan) summary() *Summary {
	sum := &Summary{Spaces: len(p.spaces), FilesPerSpace: map[string]int{}}
	for _, s := range p.spaces {
		sum.Files += len(s.files)
		sum.Folders += len(s.folders) - 1
		sum.FilesPerSpace[s.id] = len(s.files)
		for i := range s.files {
			f := &s.files[i]
			sum.Blobs += int(f.contents)
			sum.Revisions += int(max(0, f.contents-1))
			if f.trashed != 0 || s.folders[f.folder].trashed != 0 {
				sum.Trashed++
			}
			if f.inFlight {
				sum.InFlight++
				sum.Blobs--
			}
		}
	}
	for _, it := range p.items {
		sum.BlobBytes += it.size
	}
	return sum
}

func (p *plan) folderID(s *space, i int) string {
	if i == 0 {
		return s.id
	}
	return uuid(p.o.Seed, forNodeID, s.index, -i)
}

func (p *plan) fileID(s *space, i int) string { return uuid(p.o.Seed, forNodeID, s.index, i) }

func (p *plan) blobID(it int32) string { return uuid(p.o.Seed, forBlobID, int(it), 0) }

func (p *plan) folderName(s *space, i int) string {
	r := stream(p.o.Seed, forName, s.index, -i)
	return fmt.Sprintf("%s %d", folderNames[r.below(len(folderNames))], i)
}

func (p *plan) fileName(s *space, i int) string {
	r := stream(p.o.Seed, forName, s.index, i)
	f := &s.files[i]
	kind := prose
	if f.contents > 0 {
		kind = p.items[f.first].kind
	}
	return drawName(&r, kind, i)
}

func drawName(r *rng, kind contentKind, n int) string {
	exts := denseExts
	if kind == prose {
		exts = proseExts
	}
	return fmt.Sprintf("%s %d%s", fileNames[r.below(len(fileNames))], n, exts[r.below(len(exts))])
}

// path is where a folder stands in its space, starting with a slash; "" for the root.
func (p *plan) path(s *space, i int) string {
	if i == 0 {
		return ""
	}
	return p.path(s, int(s.folders[i].parent)) + "/" + p.folderName(s, i)
}

// rootTarget is the value of an index entry of the space.
func rootTarget(id string) string {
	return "../../../" + ocis.SpacePath(id) + "/nodes/" + ocis.NodePath(id)
}

var (
	givenNames   = []string{"Alan", "Mary", "Margaret", "Dennis", "Lynn", "Grace", "Edsger", "Barbara", "Niklaus", "Frances", "Donald", "Radia", "Tony", "Karen", "Jürgen", "Łucja", "Søren", "Zoë", "Андрей", "美咲"}
	familyNames  = []string{"Kowalska", "Müller", "Ng", "O'Brien", "Åkesson", "Петров", "Sato", "Costa", "Yılmaz", "Dupont", "Novák"}
	projectNames = []string{"Bauprojekt", "Marketing", "Проект", "Comptabilité", "Research & Development", "人事", "Events", "Website"}
	folderNames  = []string{"Projekte", "Fotos", "Rechnungen", "Verträge", "Архив", "資料", "Reports", "Scans", "Old stuff", "2023 – Sommer", "émoji 😀", "percent%20", "quote's \"x\"", "Protokolle", "Music", "backup.d"}
	fileNames    = []string{"IMG", "Angebot", "Bericht – Entwurf", "Screenshot", "scan", "Grundriss", "файл", "会議メモ", "Résumé", "invoice", "Notizen", "data (copy)", "Präsentation", "ünïcode", "DSC", "it's final"}
	denseExts    = []string{".jpg", ".jpg", ".jpg", ".mp4", ".zip", ".pdf", ".docx", ".odt", ".png", ".heic"}
	proseExts    = []string{".txt", ".md", ".csv", ".log", ".json", ".html", ".xml"}
)
